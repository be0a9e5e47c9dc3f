"""Scans in the layouts of DICOM, MIRAX, Sakura and CZI, written tile by tile."""

import io
import sqlite3
import struct
from contextlib import closing

import numpy as np
from PIL import Image

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


def write_dicom(folder, levels, tile=64, um=0.25, series="1.2.826.0.1.5", kind="VOLUME", missing=()):
    """Write each of the levels (H, W, 3), the full resolution first, as a file of one series; returns the files.

    Args:
        folder: where to.
        levels: pixels of uint8.
        tile: height and width of a frame.
        um: µm per px of the first level.
        series: UID of the series.
        kind: what the files show.
        missing: (row, column) of tiles of the first level that are not stored.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    files = []
    for number, pixels in enumerate(levels):
        height, width = pixels.shape[:2]
        rows, columns = -(-height // tile), -(-width // tile)
        padded = np.pad(pixels, ((0, rows * tile - height), (0, columns * tile - width), (0, 0)))
        places = [(y, x) for y in range(rows) for x in range(columns) if number or (y, x) not in missing]
        frames = [padded[y * tile : (y + 1) * tile, x * tile : (x + 1) * tile] for y, x in places]
        about, measures, shared, optical = FileMetaDataset(), Dataset(), Dataset(), Dataset()
        about.MediaStorageSOPClassUID, about.TransferSyntaxUID = WHOLE_SLIDE, ExplicitVRLittleEndian
        about.MediaStorageSOPInstanceUID = f"{series}.{number}"
        measures.PixelSpacing = [um / 1000 * levels[0].shape[0] / height, um / 1000 * levels[0].shape[1] / width]
        shared.PixelMeasuresSequence = [measures]
        optical.OpticalPathIdentifier = "1"
        slide = Dataset()
        slide.file_meta = about
        slide.SOPClassUID, slide.SOPInstanceUID, slide.SeriesInstanceUID = WHOLE_SLIDE, f"{series}.{number}", series
        slide.ImageType = [*("DERIVED", "PRIMARY", kind), "RESAMPLED" if number else "NONE"]
        slide.TotalPixelMatrixColumns, slide.TotalPixelMatrixRows = width, height
        slide.Rows = slide.Columns = tile
        slide.NumberOfFrames, slide.SamplesPerPixel, slide.PhotometricInterpretation = len(frames), 3, "RGB"
        slide.PlanarConfiguration = slide.PixelRepresentation = 0
        slide.BitsAllocated, slide.BitsStored, slide.HighBit = 8, 8, 7
        slide.DimensionOrganizationType = "TILED_SPARSE" if missing else "TILED_FULL"
        slide.SharedFunctionalGroupsSequence, slide.OpticalPathSequence = [shared], [optical]
        if missing:
            slide.PerFrameFunctionalGroupsSequence = [_place(y * tile, x * tile) for y, x in places]
        slide.PixelData = np.stack(frames).tobytes()
        slide["PixelData"].VR = "OB"
        files.append(folder / f"{series}-{number}.dcm")
        slide.save_as(files[-1], enforce_file_format=True)
    return files


def _place(row, column):
    from pydicom.dataset import Dataset

    place, group = Dataset(), Dataset()
    place.RowPositionInTotalImagePixelMatrix, place.ColumnPositionInTotalImagePixelMatrix = row + 1, column + 1
    group.PlanePositionSlideSequence = [place]
    return group


def write_mirax(path, levels, tile=64, um=0.25, missing=()):
    """Write levels (H, W, 3), each half as large as the one before and cut into whole tiles, as a MIRAX scan.

    Args:
        path: the .mrxs file; the pixels go to a folder beside it.
        levels: pixels of uint8.
        tile: height and width of a tile.
        um: µm per px of the first level.
        missing: (row, column) of tiles of the first level that were not scanned.
    """
    folder, identity = path.with_suffix(""), "0123456789ABCDEF"
    folder.mkdir()
    path.write_bytes(b"")
    down, across = (length // tile for length in levels[0].shape[:2])
    data, pages = bytearray(b"data"), []
    for number, pixels in enumerate(levels):
        step, entries = 2**number, []
        for y in range(pixels.shape[0] // tile):
            for x in range(pixels.shape[1] // tile):
                if number or (y, x) not in missing:
                    encoded = io.BytesIO()
                    part = pixels[y * tile : (y + 1) * tile, x * tile : (x + 1) * tile]
                    Image.fromarray(part).save(encoded, "PNG")
                    entries.append((y * step * across + x * step, len(data), len(encoded.getvalue()), 0))
                    data += encoded.getvalue()
        pages.append(entries)
    # The index: where the list of levels begins; of each level where its page begins; of each tile where it lies.
    start = len("01.02") + len(identity)
    index = bytearray(struct.pack("<ii", start + 8, 0))
    place = start + 8 + 4 * len(pages)
    lists, listed = bytearray(), bytearray()
    for entries in pages:
        lists += struct.pack("<i", place + len(listed))
        page = struct.pack("<ii", 0, place + len(listed) + 8) + struct.pack("<ii", len(entries), 0)
        listed += page + b"".join(struct.pack("<iiii", *entry) for entry in entries)
    (folder / "Index.dat").write_bytes(b"01.02" + identity.encode() + index + lists + listed)
    (folder / "Data0000.dat").write_bytes(data)
    sections = "".join(
        f"[L{number}]\nOVERLAP_X=0\nOVERLAP_Y=0\nMICROMETER_PER_PIXEL_X={um * 2**number}\n"
        f"MICROMETER_PER_PIXEL_Y={um * 2**number}\nIMAGE_FORMAT=PNG\nIMAGE_FILL_COLOR_BGR=16777215\n"
        f"DIGITIZER_WIDTH={tile}\nDIGITIZER_HEIGHT={tile}\nIMAGE_CONCAT_FACTOR={min(number, 1)}\n"
        for number in range(len(levels))
    )
    names = "".join(
        f"HIER_0_VAL_{number}=Zoom_{number}\nHIER_0_VAL_{number}_SECTION=L{number}\n" for number in range(9)
    )
    (folder / "Slidedat.ini").write_text(
        f"[GENERAL]\nSLIDE_ID={identity}\nIMAGENUMBER_X={across}\nIMAGENUMBER_Y={down}\nOBJECTIVE_MAGNIFICATION=40\n"
        f"CameraImageDivisionsPerSide=1\n[HIERARCHICAL]\nHIER_COUNT=1\nNONHIER_COUNT=0\nINDEXFILE=Index.dat\n"
        f"HIER_0_NAME=Slide zoom level\nHIER_0_COUNT={len(levels)}\n{names}[DATAFILE]\nFILE_COUNT=1\n"
        f"FILE_0=Data0000.dat\n{sections}"
    )


def write_svslide(path, levels, tile=64, um=0.25, planes=1):
    """Write levels (H, W, 3), each half as large as the one before, as a scan of Sakura: a database of grey JPEGs.

    Args:
        path: the file.
        levels: pixels of uint8.
        tile: height and width of a tile.
        um: µm per px of the first level.
        planes: number of focal planes; the middle one has the pixels, others are black.
    """
    height, width = levels[0].shape[:2]
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("CREATE TABLE DataManagerSQLiteConfigXPO (TableName TEXT)")
        file.execute("INSERT INTO DataManagerSQLiteConfigXPO VALUES ('scan 1')")
        file.execute("CREATE TABLE SVSlideDataXPO (OID, SlideId, Date, Description, Creator, DiagnosisCode, Keywords)")
        file.execute("INSERT INTO SVSlideDataXPO (OID) VALUES (1)")
        file.execute(
            "CREATE TABLE SVHRScanDataXPO (ParentSlide, ScanId, ResolutionMmPerPix REAL, Date, Name, Description)"
        )
        file.execute("INSERT INTO SVHRScanDataXPO (ParentSlide, ResolutionMmPerPix) VALUES (1, ?)", [um / 1000])
        file.execute('CREATE TABLE "scan 1" (id TEXT PRIMARY KEY, data BLOB)')
        header = struct.pack("<IIIII", tile, width, height, 0, planes)
        rows = [("++MagicBytes", "SVGigaPixelImage"), ("Header", header)]
        for number, pixels in enumerate(levels):
            step = 2**number
            for y in range(0, pixels.shape[0], tile):
                for x in range(0, pixels.shape[1], tile):
                    for colour, plane in np.ndindex(3, planes):
                        part = np.zeros((tile, tile), np.uint8)
                        if plane == (planes + 1) // 2 - 1:
                            part[: pixels.shape[0] - y, : pixels.shape[1] - x] = pixels[
                                y : y + tile, x : x + tile, colour
                            ]
                        encoded = io.BytesIO()
                        Image.fromarray(part).save(encoded, "JPEG", quality=100)
                        rows.append((f"T;{x * step}|{y * step};{step};{colour};{plane}", encoded.getvalue()))
        file.executemany('INSERT INTO "scan 1" VALUES (?, ?)', rows)


def write_czi(path, scenes, steps=(1,), tile=100, um=0.25, names=("DAPI", "GFP"), missing=()):
    """Write scenes (T, Z, C, H, W), or (H, W, 3) in colour, as a CZI of tiles by pylibCZIrw.

    The library writes no pyramids, so their layers are written as tiles of the full resolution, and then enlarged in
    the lists of tiles.

    Args:
        path: the file.
        scenes: pixels of each scene, of one shape; two lie 50 px from each other. A single one has no number.
        steps: px of the full resolution in a px of each layer of the pyramid, along one side.
        tile: height and width of a tile in its px.
        um: µm per px of the full resolution.
        names: names of the channels.
        missing: numbers of tiles of the first plane, over all layers, that are not written, neither in other planes.
    """
    from pylibCZIrw import czi

    layers = []
    with czi.create_czi(str(path)) as document:
        for scene, pixels in enumerate(scenes):
            planes = pixels[None, None, None] if pixels.ndim == 3 else pixels[..., None]
            left, options = scene * (planes.shape[4] + 50) - 30, {"scene": scene} if len(scenes) > 1 else {}
            places = []
            for step in steps:
                height, width = (side // step for side in planes.shape[3:5])
                places += [(step, y, x) for y in range(0, height, tile) for x in range(0, width, tile)]
            places = [place for number, place in enumerate(places) if number not in missing]
            layers = [step for step, _, _ in places]
            for step, y, x in places:
                height, width = (side // step for side in planes.shape[3:5])
                low = planes[:, :, :, ::step, ::step, ::-1][:, :, :, :height, :width]
                for t, z, c in np.ndindex(planes.shape[:3]):
                    part = np.ascontiguousarray(low[t, z, c, y : y + tile, x : x + tile])
                    at = {"T": t, "Z": z, "C": c}
                    document.write(part, plane=at, location=(left + x * step, 20 + y * step), **options)
        sizes = {"scale_x": um / 1e6, "scale_y": um / 1e6, "scale_z": 1e-6}
        document.write_metadata("test", channel_names=dict(enumerate(names)), **sizes)
    path.write_bytes(_enlarged(path.read_bytes(), layers))


def _enlarged(content, layers):
    """A CZI whose tile number m of each plane has ``layers[m]`` px of the full resolution in each of its px."""
    content, entry = bytearray(content), content.find(b"DV")
    while entry >= 0:
        (count,) = struct.unpack_from("<i", content, entry + 28)
        places = {content[at]: at for at in range(entry + 32, entry + 32 + 20 * count, 20)} if 2 < count < 9 else {}
        if {*b"XYM"} <= places.keys():
            (number,) = struct.unpack_from("<i", content, places[ord("M")] + 4)
            for axis in b"XY":
                (stored,) = struct.unpack_from("<i", content, places[axis] + 16)
                struct.pack_into("<i", content, places[axis] + 8, stored * layers[number])
        entry = content.find(b"DV", entry + 1)
    return content
