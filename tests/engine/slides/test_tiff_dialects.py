"""What the dialects of TIFF say: pixel sizes, channel names, which picture is the scan."""

import numpy as np
import pytest
import tifffile

from cellseg_batch.engine.slides.discover import find_images
from tests.support.slides import coordinates, only

PIXELS = coordinates("yx", (64, 64), "uint8")
RGB = np.stack([PIXELS] * 3, -1)
APERIO = "Aperio Image Library v11.2.1\r\n64x64 [0,0 64x64] (32x32) JPEG/RGB Q=70|AppMag = 40|MPP = {}"


def write_svs(path, um, associated=()):
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(RGB, photometric="rgb", tile=(32, 32), description=APERIO.format(um), metadata=None)
        for subfiletype, side in associated:
            tiff.write(RGB[:side, :side], photometric="rgb", subfiletype=subfiletype, metadata=None)


@pytest.mark.parametrize(("um", "known"), [("0.25", 0.25), ("0,25", None), ("nan", None), ("0", None), ("-1", None)])
def test_svs_pixel_sizes(tmp_path, um, known):
    write_svs(tmp_path / "a.svs", um)
    slide = only(tmp_path / "a.svs")
    assert slide.pixel_size_um(0) == known
    assert slide.rgb
    assert [um in note for note in slide.notes] == [True] * (known is None)


def test_pictures_of_an_svs_beside_its_scan_are_left_out_and_said(tmp_path):
    write_svs(tmp_path / "a.svs", 0.25, [(0, 20), (1, 30), (9, 40), (0, 50)])
    slide = only(tmp_path / "a.svs")
    assert slide.plane_shape(0) == (64, 64)
    note = " ".join(slide.notes)
    assert all(name in note for name in ("Thumbnail (20", "Label (30", "Macro (40", "page 4"))


@pytest.mark.parametrize(
    ("unit", "per_px", "um"),
    [
        ("inch", 1 / 96, None),
        ("inch", 1 / 254_000, 0.1),
        ("um", 0.325, 0.325),
        ("micron", 0.325, 0.325),
        ("\\u00B5m", 0.325, 0.325),
        ("nm", 325, 0.325),
        ("um", 30, 30),
        ("pixel", 1, None),
    ],
)
def test_imagej_pixel_sizes(tmp_path, unit, per_px, um):
    options = {"resolution": (1 / per_px, 1 / per_px), "metadata": {"spacing": 4 * per_px, "unit": unit, "axes": "ZYX"}}
    tifffile.imwrite(tmp_path / "a.tif", np.stack([PIXELS] * 3), imagej=True, **options)
    slide = only(tmp_path / "a.tif")
    assert slide.pixel_size_um(0) == (um and pytest.approx(um, rel=1e-5))
    assert slide.levels[0].scale[0] == pytest.approx(4 * um if um else 1, rel=1e-5)
    assert slide.units == ("micrometer" if um else None,) * 3


@pytest.mark.parametrize("labels", [["actin", "DAPI"], ["c:1/2 - actin", "c:2/2 - DAPI"]])
def test_imagej_channel_names(tmp_path, labels):
    metadata = {"axes": "CYX", "Labels": labels}
    tifffile.imwrite(tmp_path / "a.tif", np.stack([PIXELS, PIXELS]), imagej=True, metadata=metadata)
    assert only(tmp_path / "a.tif").channels == ("actin", "DAPI")


@pytest.mark.parametrize(
    ("unit", "resolution", "um", "noted"),
    [
        ("CENTIMETER", (20000, 1), 0.5, False),
        ("INCH", (50800, 1), 0.5, False),
        ("INCH", (72, 1), None, False),
        ("NONE", (20000, 1), None, False),
        ("CENTIMETER", (1, 0), None, True),
        ("CENTIMETER", (0, 1), None, True),
    ],
)
def test_resolution_tags(tmp_path, unit, resolution, um, noted):
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, resolution=(1000, 1000), resolutionunit=unit, metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tiff:
        for name in ("XResolution", "YResolution"):
            tiff.pages[0].tags[name].overwrite(resolution)
    slide = only(tmp_path / "a.tif")
    assert slide.pixel_size_um(0) == um
    assert bool(slide.notes) == noted


def write_scn(path, *images):
    """A Leica SCN; of each image (name, side in px, side and offset of its view in nm). The glass is 1,000,000 nm."""
    described = "".join(
        f'<image name="{name}"><pixels sizeX="{side}" sizeY="{side}"><dimension sizeX="{side}" sizeY="{side}" r="0" '
        f'ifd="{page}"/></pixels><view sizeX="{view}" sizeY="{view}" offsetX="{offset}" offsetY="{offset}"/></image>'
        for page, (name, side, view, offset) in enumerate(images)
    )
    xml = '<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection sizeX="1000000" sizeY="1000000">'
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for page, (_, side, _, _) in enumerate(images):
            description = None if page else f"{xml}{described}</collection></scn>"
            options = {"photometric": "rgb", "tile": (16, 16), "metadata": None}
            tiff.write(RGB[:side, :side], description=description, **options)


def test_every_scan_of_an_scn_is_an_image_and_the_glass_is_none(tmp_path):
    scans = ("image_1", 64, 32_000, 5), ("image_2", 32, 16_000, 9)
    write_scn(tmp_path / "a.scn", ("image_0", 48, 1_000_000, 0), *scans)
    slides = find_images(tmp_path / "a.scn")
    assert [(slide.name, slide.plane_shape(0)) for slide in slides] == [("a.scn/1", (64, 64)), ("a.scn/2", (32, 32))]
    assert [slide.pixel_size_um(0) for slide in slides] == [0.5, 0.5]
    assert "image_0 (48 x 48 x 3)" in slides[0].notes[0]


def test_channels_of_a_qptiff_have_names(tmp_path):
    about = "<PerkinElmer-QPI-ImageDescription><Name>{}</Name></PerkinElmer-QPI-ImageDescription>"
    with tifffile.TiffWriter(tmp_path / "a.qptiff", bigtiff=True) as tiff:
        for name in ("actin", "DAPI"):
            options = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER", "software": "PerkinElmer-QPI"}
            tiff.write(PIXELS, tile=(32, 32), description=about.format(name), metadata=None, **options)
    slide = only(tmp_path / "a.qptiff")
    assert (slide.axes, slide.channels, slide.pixel_size_um(0)) == ("cyx", ("actin", "DAPI"), 0.5)


@pytest.mark.parametrize(
    ("dtype", "channel", "rgb"),
    [
        ("uint8", {"Name": ["Channel 0", "Channel 1", "Channel 2"], "Color": [-16776961, 16711935, 65535]}, True),
        ("uint8", {"Color": [-16776961, 16711935, 65535]}, True),
        ("uint16", {"Name": ["Red", "Green", "Blue"]}, True),
        ("uint8", {"Name": ["DAPI", "actin", "CD3"], "Color": [-16776961, 16711935, 65535]}, False),
        ("uint16", {"Color": [-16776961, 16711935, 65535]}, False),
        ("uint8", {"Color": [65535, 16711935, -16776961]}, False),
        ("uint8", {}, False),
    ],
)
def test_channels_of_an_ome_tiff_are_colours_if_it_says_so(tmp_path, dtype, channel, rgb):
    pixels = coordinates("cyx", (3, 64, 64), dtype)
    about = {"axes": "CYX", "Channel": channel}
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, photometric="minisblack", ome=True, metadata=about)
    slide = only(tmp_path / "a.ome.tif")
    assert slide.rgb is rgb
    assert [note[:26] for note in slide.notes] == ["taken for red, green, blue"] * (rgb and dtype == "uint8")


@pytest.mark.parametrize(
    ("extra", "left_out"), [(["unassalpha"], 0), (["unspecified"], 1), (["unassalpha", "unspecified"], 2)]
)
def test_samples_beside_colours_are_said(tmp_path, extra, left_out):
    pixels = coordinates("yxc", (64, 64, 3 + len(extra)), "uint8")
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=extra, metadata=None)
    slide = only(tmp_path / "a.tif")
    assert slide.rgb
    assert [note[:20] for note in slide.notes] == [f"{left_out} samples of a pixel"] * (left_out > 0)


def test_pixel_size_and_overviews_of_a_philips_tiff(tmp_path):
    spacing = '<Attribute Name="DICOM_PIXEL_SPACING">"0.0005" "0.00025"</Attribute>'
    xml = f'<DataObject ObjectType="DPUfsImport"><DataObject>{spacing}</DataObject></DataObject>'
    with tifffile.TiffWriter(tmp_path / "a.tiff") as tiff:
        tiff.write(RGB, photometric="rgb", tile=(32, 32), description=xml, software="Philips DP v1.0", metadata=None)
        for name in ("Macro -offset=(0,0)", "Label"):
            tiff.write(RGB[:40], photometric="rgb", description=name, metadata=None)
    slide = only(tmp_path / "a.tiff")
    assert slide.levels[0].scale[:2] == pytest.approx((0.5, 0.25))
    assert "left out beside the scan" in slide.notes[0]


@pytest.mark.parametrize(("resolution", "um"), [("0.25", 0.25), ("0,25", None)])
def test_pixel_size_of_a_ventana_tiff(tmp_path, resolution, um):
    xmp = f'<Metadata><iScan ScanRes="{resolution}" Magnification="40"/></Metadata>'.encode()
    with tifffile.TiffWriter(tmp_path / "a.bif", bigtiff=True) as tiff:
        about = {"description": "Label_Image", "extratags": [(700, "B", len(xmp), xmp, True)]}
        tiff.write(RGB[:40], photometric="rgb", metadata=None, **about)
        tiff.write(RGB, photometric="rgb", tile=(32, 32), description="level=0 mag=40", metadata=None)
    slide = only(tmp_path / "a.bif")
    assert slide.plane_shape(0) == (64, 64)
    assert slide.pixel_size_um(0) == um
    assert any("0,25" in note for note in slide.notes) == (um is None)


@pytest.mark.parametrize(("state", "um"), [("on", 0.65), ("off", None)])
def test_pixel_size_of_a_metaxpress_tiff(tmp_path, state, um):
    calibration = {"state": state, "x": "0.65", "y": "0.65", "units": "um"}
    properties = "".join(f'<prop id="spatial-calibration-{id}" value="{value}"/>' for id, value in calibration.items())
    xml = f"<MetaData><PlaneInfo>{properties}</PlaneInfo></MetaData>"
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, description=xml, software="MetaSeries", metadata=None)
    assert only(tmp_path / "a.tif").pixel_size_um(0) == um


def test_pages_that_are_described_as_label_and_macro_are_no_images(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for description, pixels in (("scan", RGB), ("label image", RGB[:30]), ("Macro", RGB[:40])):
            tiff.write(pixels, photometric="rgb", description=description, metadata=None)
    slide = only(tmp_path / "a.tif")
    assert slide.plane_shape(0) == (64, 64)
    assert "page 1 (30 x 64 x 3), page 2 (40 x 64 x 3)" in slide.notes[0]
