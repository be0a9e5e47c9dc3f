"""Forty small files and stores, one or more of every kind that needs no extra, each in a folder of its own."""

from collections.abc import Callable
from pathlib import Path
from warnings import catch_warnings

import imagecodecs
import numpy as np
import tifffile
import zarr
from PIL import Image
from zarr.codecs import GzipCodec

from tests.support.images import blobs, fill_ome_zarr, write_ome_zarr, write_plate

COLOURS = blobs(72, 88)  # (C, H, W)
GREY = COLOURS[0]
RGB = np.ascontiguousarray(np.moveaxis(COLOURS, 0, -1))
DEEP = GREY.astype("uint16") * 200
STACK = np.stack([DEEP, DEEP[::-1]])
SCHEMA = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
APERIO = "Aperio Image Library v11.2.1\r\n88x72 [0,0 88x72] (32x32) JPEG/RGB Q=70|AppMag = 40|MPP = 0.5"
QPI = "<PerkinElmer-QPI-ImageDescription><Name>{}</Name></PerkinElmer-QPI-ImageDescription>"


def _tiff(name: str, *pages: np.ndarray, bigtiff: bool = False, **options: object) -> Callable[[Path], None]:
    """A writer of a TIFF whose pages have the same options."""

    def write(folder: Path) -> None:
        with tifffile.TiffWriter(folder / name, bigtiff=bigtiff) as tiff:
            for page in pages:
                tiff.write(page, **{"metadata": None, **options})

    return write


def _shaped(name: str, pixels: np.ndarray, **options: object) -> Callable[[Path], None]:
    """A writer of a TIFF as `tifffile.imwrite` makes it of an array."""
    return lambda folder: tifffile.imwrite(folder / name, pixels, **options)


def _pyramid(name: str, pixels: np.ndarray, **options: object) -> Callable[[Path], None]:
    """A writer of a TIFF with a lower resolution as a page within the first."""

    def write(folder: Path) -> None:
        with tifffile.TiffWriter(folder / name) as tiff:
            tiff.write(pixels, subifds=1, tile=(32, 32), **options)
            tiff.write(pixels[..., ::2, ::2], subfiletype=1, tile=(32, 32))

    return write


def _svs(folder: Path) -> None:
    options = {"photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(folder / "a.svs") as tiff:
        tiff.write(RGB, tile=(32, 32), compression="jpeg", description=APERIO, **options)
        tiff.write(RGB[::4, ::4], description=APERIO, **options)
        tiff.write(RGB[:20, :30], subfiletype=1, description=f"{APERIO}\rlabel 30x20", **options)


def _scn(folder: Path) -> None:
    images = "".join(
        f'<image name="i{page}"><pixels sizeX="{88 // step}" sizeY="{72 // step}"><dimension sizeX="{88 // step}" '
        f'sizeY="{72 // step}" r="0" ifd="{page}"/></pixels><view sizeX="{view}" sizeY="{view}" offsetX="{page}" '
        f'offsetY="{page}"/></image>'
        for page, (step, view) in enumerate([(2, 1_000_000), (1, 44_000), (1, 43_000)])
    )
    xml = '<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection sizeX="1000000" sizeY="1000000">'
    options = {"photometric": "rgb", "tile": (16, 16), "metadata": None}
    with tifffile.TiffWriter(folder / "a.scn", bigtiff=True) as tiff:
        tiff.write(RGB[::2, ::2], description=f"{xml}{images}</collection></scn>", **options)
        tiff.write(RGB, **options)
        tiff.write(RGB[::-1], **options)


def _qptiff(folder: Path) -> None:
    options = {"tile": (32, 32), "metadata": None, "software": "PerkinElmer-QPI", "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(folder / "a.qptiff", bigtiff=True) as tiff:
        for name in ("actin", "DAPI"):
            tiff.write(GREY, description=QPI.format(name), resolution=(20000, 20000), **options)


def _ome_series(folder: Path) -> None:
    with tifffile.TiffWriter(folder / "a.ome.tif") as tiff:
        tiff.write(GREY, metadata={"axes": "YX", "Name": "first"})
        tiff.write(STACK, metadata={"axes": "CYX", "Name": "second", "Channel": {"Name": ["actin", "DAPI"]}})


def _ome_xml(files: list[str]) -> str:
    """OME-XML of an image whose channels are each in a file of their own."""
    data = "".join(
        f'<TiffData FirstC="{c}" IFD="0" PlaneCount="1"><UUID FileName="{file}">urn:uuid:{file}</UUID></TiffData>'
        for c, file in enumerate(files)
    )
    channels = "".join(f'<Channel ID="C:0:{c}" Name="c{c}" SamplesPerPixel="1"/>' for c in range(len(files)))
    return (
        '<Image ID="Image:0"><Pixels ID="P:0" DimensionOrder="XYCZT" Type="uint8" SizeX="88" SizeY="72" '
        f'SizeC="{len(files)}" SizeZ="1" SizeT="1" PhysicalSizeX="0.5">{channels}{data}</Pixels></Image>'
    )


def _ome_files(folder: Path) -> None:
    names = ["a.ome.tif", "b.ome.tif"]
    for name in names:
        xml = f'<OME xmlns="{SCHEMA}" UUID="urn:uuid:{name}">{_ome_xml(names)}</OME>'
        tifffile.imwrite(folder / name, GREY, description=xml, metadata=None)


def _companion(folder: Path) -> None:
    names = ["a.ome.tif", "b.ome.tif"]
    (folder / "a.companion.ome").write_text(f'<OME xmlns="{SCHEMA}" UUID="urn:uuid:c">{_ome_xml(names)}</OME>')
    for name in names:
        xml = (
            f'<OME xmlns="{SCHEMA}" UUID="urn:uuid:{name}"><BinaryOnly MetadataFile="a.companion.ome" UUID="c"/></OME>'
        )
        tifffile.imwrite(folder / name, GREY, description=xml, metadata=None)


def _sizes(folder: Path) -> None:
    with tifffile.TiffWriter(folder / "a.tif") as tiff:
        for page in (GREY, GREY[:50], GREY[:, :40]):
            tiff.write(page, metadata=None)


def _picture(name: str, pixels: np.ndarray, mode: str | None = None, **options: object) -> Callable[[Path], None]:
    """A writer of a picture by Pillow, in one of its modes."""

    def write(folder: Path) -> None:
        picture = Image.fromarray(pixels)
        (picture.convert(mode) if mode else picture).save(folder / name, **options)

    return write


def _deep_png(pixels: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: (folder / "a.png").write_bytes(imagecodecs.png_encode(pixels)) and None


def _ome_zarr(pixels: np.ndarray, axes: str, version: str, **options: object) -> Callable[[Path], None]:
    return lambda folder: write_ome_zarr(folder / "a.zarr", pixels, axes, version, chunk=32, **options) and None


def _labelled(folder: Path) -> None:
    write_ome_zarr(folder / "a.zarr", COLOURS, chunk=32)
    labels = zarr.open_group(str(folder / "a.zarr")).create_group("labels", attributes={"ome": {"labels": ["nuclei"]}})
    nuclei = labels.create_group("nuclei")
    fill_ome_zarr(nuclei, folder, GREY // 200, "yx", levels=1)
    nuclei.attrs["ome"] = {**nuclei.attrs["ome"], "image-label": {"source": {"image": "../../"}}}


def _consolidated(version: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        store = write_ome_zarr(folder / "a.zarr", COLOURS, version=version, chunk=32)
        with catch_warnings(action="ignore", category=UserWarning):  # version 3 does not specify it
            zarr.consolidate_metadata(str(store))

    return write


def _array(zarr_format: int, pixels: np.ndarray, **options: object) -> Callable[[Path], None]:
    """A writer of an array that is no OME-Zarr."""

    def write(folder: Path) -> None:
        options_here = {"data": pixels, "chunks": (1,) * (pixels.ndim - 2) + (32, 32), "zarr_format": zarr_format}
        zarr.create_array(str(folder / "a.zarr"), **{**options_here, **options})

    return write


def _group(folder: Path) -> None:
    root = zarr.open_group(str(folder / "a.zarr"), mode="w")
    for name, pixels in (("b", GREY), ("c", COLOURS)):
        root.create_array(name, data=pixels, chunks=(1,) * (pixels.ndim - 2) + (32, 32))
    fill_ome_zarr(root.create_group("d/e"), folder, GREY, "yx", levels=1)


def _bioformats2raw(version: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        layout = {"bioformats2raw.layout": 3}
        attributes = {"ome": layout} if version == "0.5" else layout
        zarr_format = 3 if version == "0.5" else 2
        root = zarr.open_group(str(folder / "a.zarr"), mode="w", zarr_format=zarr_format, attributes=attributes)
        series = {"series": ["0", "1"]}
        root.create_group("OME", attributes={"ome": series} if version == "0.5" else series)
        for name in ("0", "1"):
            fill_ome_zarr(root.create_group(name), folder, COLOURS[None, :, None], "tczyx", version, levels=1, chunk=64)
        images = "".join(f'<Image ID="Image:{i}" Name="{name}"><Pixels/></Image>' for i, name in enumerate("ab"))
        (folder / "a.zarr" / "OME" / "METADATA.ome.xml").write_text(f'<OME xmlns="{SCHEMA}">{images}</OME>')

    return write


def _old_plate(folder: Path) -> None:
    plate = zarr.open_group(str(folder / "a.zarr"), mode="w", zarr_format=2)
    plate.attrs["plate"] = {"wells": [{"path": "A/1"}], "rows": [{"name": "A"}], "columns": [{"name": "1"}]}
    well = plate.create_group("A/1", attributes={"well": {"images": [{"path": "0"}, {"path": "1"}]}})
    for field in ("0", "1"):
        fill_ome_zarr(well.create_group(field), folder, COLOURS, version="0.4", levels=1, chunk=64)


ORIGINALS: dict[str, Callable[[Path], None]] = {
    "strips": _tiff("a.tif", GREY, rowsperstrip=16),
    "tiles": _tiff("a.tif", DEEP, tile=(32, 32), compression="zlib", predictor=True, resolution=(20000, 20000)),
    "big": _tiff("a.btf", GREY, tile=(32, 32), compression="zstd", bigtiff=True),
    "jpeg tiles": _tiff("a.tif", RGB, photometric="rgb", tile=(32, 32), compression="jpeg"),
    "jpeg 2000 tiles": _tiff("a.tiff", RGB, photometric="rgb", tile=(32, 32), compression=33005),
    "planar": _tiff("a.tif", np.stack([DEEP] * 5), photometric="minisblack", planarconfig="separate"),
    "alpha": _tiff("a.tif", np.dstack([RGB, GREY]), photometric="rgb", extrasamples=["unassalpha"]),
    "floats": _tiff("a.tif", GREY.astype("float32"), compression="lzw", predictor=3),
    "bilevel": _tiff("a.tif", GREY > 100, photometric="minisblack", compression="packbits"),
    "pages": _tiff("a.tif", GREY, GREY, GREY),
    "sizes": _sizes,
    "shaped": _shaped("a.tif", STACK, metadata={"axes": "ZYX"}),
    "imagej": _shaped("a.tif", STACK, imagej=True, metadata={"axes": "CYX", "Labels": ["a", "DAPI"], "unit": "um"}),
    "imagej time": _shaped("a.tif", np.stack([STACK] * 2), imagej=True, metadata={"axes": "TZYX", "spacing": 2.0}),
    "lsm": _tiff("a.lsm", COLOURS, photometric="minisblack", planarconfig="separate", compression="lzw"),
    "ome": _shaped("a.ome.tif", COLOURS, metadata={"axes": "CYX", "PhysicalSizeX": 0.5}, photometric="minisblack"),
    "ome pyramid": _pyramid("a.ome.tif", COLOURS, metadata={"axes": "CYX"}, photometric="minisblack"),
    "pyramid": _pyramid("a.tif", GREY),
    "ome series": _ome_series,
    "ome files": _ome_files,
    "companion": _companion,
    "svs": _svs,
    "scn": _scn,
    "qptiff": _qptiff,
    "png": _picture("a.png", RGB),
    "palette": _picture("a.png", RGB, "P"),
    "deep png": _deep_png(np.dstack([DEEP] * 3)),
    "jpeg": _picture("a.jpg", RGB, progressive=True, exif=Image.Exif()),
    "bmp": _picture("a.bmp", RGB),
    "ome-zarr 0.4": _ome_zarr(COLOURS, "cyx", "0.4", channels=[{"label": name} for name in ("a", "DAPI", "b")]),
    "ome-zarr 0.5": _ome_zarr(STACK[None], "czyx", "0.5"),
    "labelled": _labelled,
    "consolidated 0.4": _consolidated("0.4"),
    "consolidated 0.5": _consolidated("0.5"),
    "plate 0.4": _old_plate,
    "plate 0.5": lambda folder: write_plate(folder / "a.zarr", ["A/1", "B/2"], ["0"], side=72) and None,
    "bioformats2raw": _bioformats2raw("0.5"),
    "group": _group,
    "array v2": _array(2, DEEP, compressors=None, filters=None),
    "array v3": _array(3, COLOURS, shards=(1, 64, 64), compressors=[GzipCodec()], dimension_names=("c", "y", "x")),
}
