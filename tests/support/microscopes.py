"""Files in the layouts of ND2 and LIF, as the microscopes of Nikon and Leica write them."""

import struct
import zlib

import numpy as np

_MAGIC = 0x0ABECEDA


def write_nd2(path, pixels, um=0.25, names=("DAPI", "GFP"), compressed=False, recorded=None):
    """Write pixels (T, P, Z, C, H, W), or (T, P, Z, H, W, 3) in colour, as an ND2; P are positions of the stage.

    Args:
        path: the file.
        pixels: what the frames hold.
        um: µm per px; None if it is not calibrated.
        names: names of the channels.
        compressed: whether each frame is one zlib stream.
        recorded: number of frames that are written; None writes all.
    """
    in_colour = pixels.shape[-1] == 3
    loops, planes = pixels.shape[:3], pixels.shape[-3:]
    height, width = planes[:2] if in_colour else planes[1:]
    channels = 1 if in_colour else planes[0]
    frames = pixels.reshape(-1, *planes)[:recorded]
    interleaved = frames if in_colour else np.moveaxis(frames, 1, -1)
    components, size = interleaved.shape[-1], pixels.dtype.itemsize
    attributes = {
        **{"uiWidth": width, "uiWidthBytes": width * components * size, "uiHeight": height, "uiComp": components},
        **{"uiBpcInMemory": 8 * size, "uiBpcSignificant": 8 * size, "uiSequenceCount": len(frames)},
        "eCompression": 0 if compressed else 2,
    }
    listed = {
        f"a{number}": {
            "sDescription": names[number],
            "uiCompCount": 3 if in_colour else 1,
            "pFluorescentProbe": {"n": 1},
        }
        for number in range(channels)
    }
    metadata = {
        **{"dCalibration": float(um or 1), "bCalibrated": um is not None},
        "sPicturePlanes": {"uiCount": channels, "uiCompCount": components, "sPlaneNew": listed},
    }
    chunks = {
        "ImageAttributesLV!": _level("SLxImageAttributes", attributes),
        "ImageMetadataLV!": _level("SLxExperiment", _experiment(loops)) if max(loops) > 1 else b"",
        "ImageMetadataSeqLV|0!": _level("SLxPictureMetadata", metadata),
    }
    for number, frame in enumerate(interleaved):
        # Colours are stored with blue first.
        content = np.ascontiguousarray(frame[..., ::-1] if in_colour else frame).tobytes()
        chunks[f"ImageDataSeq|{number}!"] = bytes(8) + (zlib.compress(content) if compressed else content)
    written = bytearray(
        struct.pack("<IIQ", _MAGIC, 32, 64) + b"ND2 FILE SIGNATURE CHUNK NAME01!" + b"Ver3.0".ljust(64, b"\0")
    )
    places = b""
    for name, content in chunks.items():
        if content:
            places += name.encode() + struct.pack("<QQ", len(written), len(content))
            written += struct.pack("<IIQ", _MAGIC, 4072, len(content)) + name.encode().ljust(4072, b"\0") + content
    places += b"ND2 CHUNK MAP SIGNATURE 0000001!" + struct.pack("<Q", len(written))
    written += struct.pack("<IIQ", _MAGIC, 32, len(places)) + b"ND2 FILEMAP SIGNATURE NAME 0001!" + places
    path.write_bytes(written)


def _experiment(loops):
    """The loops over time, positions and z, each in the one before; those of one step are left out."""
    times, positions, depths = loops
    kinds = [
        (times, 1, {"uiCount": times, "dStart": 0.0, "dPeriod": 1.0, "dDuration": 1.0}),
        (positions, 2, {"Points": [{"dPosX": float(number)} for number in range(positions)]}),
        (depths, 4, {"uiCount": depths, "dZLow": 0.0, "dZHigh": 3.0, "dZStep": 1.5}),
    ]
    experiment = {}
    for count, kind, parameters in reversed(kinds):
        if count > 1:
            inner = {"ppNextLevelEx": [experiment]} if experiment else {}
            experiment = {"eType": kind, "uLoopPars": parameters, **inner}
    return experiment


def _level(name, value):
    """A value as a record of ND2's metadata: type, name, content."""
    kinds = {bool: (1, "<B"), int: (3, "<I"), float: (6, "<d")}
    encoded = (name + "\0").encode("utf-16-le")
    if isinstance(value, str):
        return struct.pack("<BB", 8, len(name) + 1) + encoded + (value + "\0").encode("utf-16-le")
    if type(value) in kinds:
        kind, form = kinds[type(value)]
        return struct.pack("<BB", kind, len(name) + 1) + encoded + struct.pack(form, value)
    members = [("", member) for member in value] if isinstance(value, list) else list(value.items())
    content = b"".join(_level(*member) for member in members)
    header = struct.pack("<BB", 11, len(name) + 1) + encoded
    return (
        header + struct.pack("<IQ", len(members), len(header) + 12 + len(content)) + content + bytes(8 * len(members))
    )


def write_lif(path, series, um=0.25, dyes=("DAPI", "GFP"), padding=0, blue_first=True):
    """Write series as a LIF: each (T, Z, C, H, W), or (H, W, 3) in colour.

    Args:
        path: the file.
        series: (name, pixels) of each, or (name, pixels, number of the dimension that t is written as).
        um: µm per px.
        dyes: names of the channels' dyes.
        padding: px that are added to each row in colour.
        blue_first: whether colours are stored with blue first.
    """
    elements, blocks = "", b""
    for number, (name, pixels, *kind) in enumerate(series):
        size, in_colour = pixels.dtype.itemsize, pixels.ndim == 3
        times, depths, channels, height, width = (1, 1, 3, *pixels.shape[:2]) if in_colour else pixels.shape
        pixel, plane = (3 * size, 0) if in_colour else (size, height * width * size)
        lengths = [(1, width, pixel), (2, height, (width + padding * in_colour) * pixel)]
        lengths += [(3, depths, channels * plane)] * (depths > 1)
        lengths += [(*(kind or [4]), times, depths * channels * plane)] * (times > 1)
        dimensions = "".join(
            f'<DimensionDescription DimID="{dimension}" NumberOfElements="{length}" Origin="0" Unit="m" '
            f'Length="{(length - 1) * um / 1e6}" BitInc="0" BytesInc="{step}"/>'
            for dimension, length, step in lengths
        )
        tags = ("3", "2", "1") if blue_first else ("1", "2", "3")
        described = "".join(
            f'<ChannelDescription DataType="0" ChannelTag="{tags[c] if in_colour else 0}" Resolution="{8 * size}" '
            f'NameOfMeasuredQuantity="" Min="0" Max="1" Unit="" LUTName="Gray" IsLUTInverted="0" '
            f'BytesInc="{c * size if in_colour else c * plane}" BitInc="0"><ChannelProperty><Key>DyeName</Key>'
            f"<Value>{'' if in_colour else dyes[c]}</Value></ChannelProperty></ChannelDescription>"
            for c in range(channels)
        )
        stored = np.pad(pixels, ((0, 0), (0, padding), (0, 0))) if in_colour else pixels
        content = np.ascontiguousarray(stored[..., ::-1] if in_colour and blue_first else stored).tobytes()
        elements += (
            f'<Element Name="{name}"><Data><Image><ImageDescription><Channels>{described}</Channels><Dimensions>'
            f"{dimensions}</Dimensions></ImageDescription></Image></Data>"
            f'<Memory Size="{len(content)}" MemoryBlockID="M{number}"/></Element>'
        )
        label = f"M{number}".encode("utf-16-le")
        blocks += struct.pack("<IIBQBI", 0x70, 0, 0x2A, len(content), 0x2A, len(label) // 2) + label + content
    xml = (
        f'<LMSDataContainerHeader Version="2"><Element Name="test"><Data/><Children>{elements}</Children></Element>'
        "</LMSDataContainerHeader>"
    ).encode("utf-16-le")
    path.write_bytes(struct.pack("<IIBI", 0x70, len(xml) + 5, 0x2A, len(xml) // 2) + xml + blocks)
