"""Whole slides in TIFFs, in the layouts of Hamamatsu (NDPI), Leica (SCN), Ventana (BIF) and Akoya (QPTIFF)."""

import struct

import numpy as np
import tifffile

UM = 0.25
_PX_PER_CM = 10_000 / UM


def write_ndpi(path, levels, overview):
    """An NDPI with levels (H, W, 3) and pictures of the glass: addresses of 64 bits, and tags of its own."""
    content = bytearray(struct.pack("<2sHQ", b"II", 42, 0))
    link = 4
    for pixels, lens in [*((level, 40.0 / 2**number) for number, level in enumerate(levels)), (overview, -1.0)]:
        place = len(content)
        content += np.ascontiguousarray(pixels).tobytes()
        height, width = pixels.shape[:2]
        per_cm = struct.pack("<II", round(_PX_PER_CM * lens / 40) if lens > 0 else 100, 1)
        numbers = {256: width, 257: height, 258: b"\x08\0" * 3, 259: 1, 262: 2, 271: b"Hamamatsu\0", 273: place, 277: 3}
        numbers |= {278: height, 279: pixels.nbytes, 282: per_cm, 283: per_cm, 296: 3, 65420: 1}
        numbers[65421] = struct.pack("<f", lens)
        types = {258: (3, 3), 271: (2, 10), 282: (5, 1), 283: (5, 1), 65421: (11, 1)}
        tags, high = b"", b""
        for tag, value in numbers.items():
            kind, count = types.get(tag, (4, 1))
            if isinstance(value, bytes) and len(value) > 4:
                number, value = len(content), bytes(value)
                content += value
            else:
                number = struct.unpack("<I", value)[0] if isinstance(value, bytes) else value
            tags += struct.pack("<HHII", tag, kind, count, number)
            high += bytes(4)
        struct.pack_into("<Q", content, link, len(content))
        link = len(content) + 2 + len(tags)
        content += struct.pack("<H", len(numbers)) + tags + bytes(8) + high
    path.write_bytes(content)


def write_scn(path, levels, overview):
    """An SCN: the XML of the first page says which pages are levels of which image."""
    height, width = levels[0].shape[:2]
    view = 'sizeX="{}" sizeY="{}" offsetX="{}" offsetY="{}"'
    dimensions = "".join(
        f'<dimension sizeX="{level.shape[1]}" sizeY="{level.shape[0]}" r="{number}" ifd="{number + 1}"/>'
        for number, level in enumerate(levels)
    )
    glass = f'<dimension sizeX="{overview.shape[1]}" sizeY="{overview.shape[0]}" r="0" ifd="0"/>'
    xml = (
        '<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection sizeX="900000" sizeY="900000">'
        f'<image name="glass"><pixels sizeX="{overview.shape[1]}" sizeY="{overview.shape[0]}">{glass}</pixels>'
        f"<view {view.format(900_000, 900_000, 0, 0)}/></image>"
        f'<image name="scan"><pixels sizeX="{width}" sizeY="{height}">{dimensions}</pixels>'
        f"<view {view.format(width * 250, height * 250, 9, 9)}/></image></collection></scn>"
    )
    options = {"photometric": "rgb", "tile": (64, 64), "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(overview, description=xml, **options)
        for level in levels:
            tiff.write(level, **options)


def write_bif(path, levels, overview):
    """A BIF: descriptions say what pages are, XMP of the first has the pixel size."""
    xmp = f'<Metadata><iScan ScanRes="{UM}" Magnification="40"/></Metadata>'.encode()
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tags = [(700, "B", len(xmp), xmp, True)]
        tiff.write(overview, photometric="rgb", metadata=None, description="Label_Image", extratags=tags)
        for number, level in enumerate(levels):
            about = {"description": f"level={number} mag={40 / 2**number:g} quality=95"}
            tiff.write(level, photometric="rgb", tile=(64, 64), metadata=None, **about)


def write_qptiff(path, levels, overview):
    """A QPTIFF: the pages of a level are its channels, (C, H, W); then a thumbnail, lower levels, the glass."""
    xml = "<PerkinElmer-QPI-ImageDescription><Name>{}</Name></PerkinElmer-QPI-ImageDescription>"
    about = {"metadata": None, "software": "PerkinElmer-QPI", "resolutionunit": "CENTIMETER"}

    def write_level(tiff, number):
        per_cm = (_PX_PER_CM / 2**number,) * 2
        for name, pixels in zip(("actin", "DAPI"), levels[number], strict=True):
            tiff.write(pixels, tile=(64, 64), description=xml.format(name), resolution=per_cm, **about)

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        write_level(tiff, 0)
        tiff.write(overview[::2, ::2], photometric="rgb", description=xml.format("Thumbnail"), **about)
        for number in range(1, len(levels)):
            write_level(tiff, number)
        tiff.write(overview, photometric="rgb", description=xml.format("Macro"), **about)
