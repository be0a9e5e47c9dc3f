"""Damage small valid images in ways that are drawn by a number: the same number always makes the same damage.

``python -m tests.support.mutations 137 FOLDER`` makes mutation 137 in a folder.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import tifffile

from tests.support.originals import ORIGINALS

SEED = 25
# Numbers that a count, a length or a size in metadata becomes, besides those near its own.
_NUMBERS = (0, -1, 1, 2**31, 2**32 - 1, 2**63, 10**30, 0.5, 1e300, float("nan"), float("inf"))
_VALUES = (None, True, "", "text", "1e9", "../..", [], [[]], [None], {}, {"a": 1}, *_NUMBERS)
# A TIFF's header and first tags, and the header of a picture, lie here; most random places are in pixels.
_HEADER = 400


def mutate(number: int, folder: Path) -> str:
    """Make mutation ``number`` of an image in the new ``folder``; returns what it is."""
    random = np.random.default_rng((SEED, number))
    name = random.choice(list(ORIGINALS))
    folder.mkdir(parents=True)
    ORIGINALS[name](folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    described = [path for path in files if _is_json(path) or path.suffix == ".xml"]
    path = _draw(random, described if described and random.random() < 0.6 else files)
    kinds = [_flip, _cut, _take_out]
    if _is_json(path):
        kinds = [_change_json] * 5 + [_flip, _cut, _remove]
    elif path.suffix in (".xml", ".ome"):
        kinds = [_change_text] * 3 + [_flip, _cut, _remove]
    elif path.suffix in (".tif", ".tiff", ".btf", ".lsm", ".svs", ".scn", ".qptiff"):
        kinds += [_change_tag] * 4 + [_change_description] * 2
    elif described:
        kinds += [_remove]
    change = kinds[random.integers(len(kinds))]
    return f"{name}: {path.relative_to(folder)}: {change(path, random)}"


def _draw(random, choices):
    return choices[random.integers(len(choices))]


def _is_json(path):
    return path.name in ("zarr.json", ".zattrs", ".zgroup", ".zarray", ".zmetadata")


def _place(random, length):
    return int(random.integers(min(length, _HEADER) if random.random() < 0.5 else length))


def _flip(path, random):
    content = bytearray(path.read_bytes())
    places = [_place(random, len(content)) for _ in range(random.integers(1, 9))]
    for place in places:
        content[place] ^= 1 << int(random.integers(8))
    path.write_bytes(content)
    return f"bits flipped in bytes {places}"


def _cut(path, random):
    content = path.read_bytes()
    length = _place(random, len(content))
    path.write_bytes(content[:length])
    return f"cut to {length} of {len(content)} bytes"


def _take_out(path, random):
    content = path.read_bytes()
    start, count = _place(random, len(content)), int(random.integers(1, 40))
    path.write_bytes(content[:start] + content[start + count :])
    return f"{count} bytes taken out at {start}"


def _remove(path, random):
    path.unlink()
    return "removed"


def _change_json(path, random):
    """Remove a field, or give it a value of another type or size."""
    document = {"document": json.loads(path.read_text())}
    holder, key = _draw(random, list(_fields(document)))
    before = holder[key]
    if random.random() < 0.3:
        del holder[key]
        after = "removed"
    else:
        holder[key] = after = _other_value(random, before)
    path.write_text(json.dumps(document.get("document")))
    return f"{key!r}, {before!s:.80}: {after!r}"


def _fields(content):
    """(holder, key) of every value in a JSON document."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield content, key
        if isinstance(value, dict | list):
            yield from _fields(value)


def _other_value(random, value):
    near = [value + 1, value * 3, -value] if isinstance(value, int | float) else []
    return _draw(random, [*near, *_NUMBERS] if near and random.random() < 0.7 else _VALUES)


def _change_tag(path, random):
    """Overwrite the code, the type, the count or the first value of a tag of any page."""
    with tifffile.TiffFile(path) as tiff:
        tag = _draw(random, [tag for page in tiff.pages for tag in page.tags.values()])
        short = 2 if tag.dtype == tifffile.DATATYPE.SHORT else 4
        fields = {"code": (tag.offset, 2), "type": (tag.offset + 2, 2), "count": (tag.offset + 4, 4)}
        field, (start, length) = _draw(random, [*fields.items(), *[("value", (tag.valueoffset, short))] * 3])
    most = 256**length - 1
    value = int(_draw(random, (0, 1, 2, 3, 4, 8, 16, 100, 257, 273, 322, 2**15, 2**31 % most, most)))
    content = bytearray(path.read_bytes())
    content[start : start + length] = value.to_bytes(length, "little")
    path.write_bytes(content)
    return f"{field} of tag {tag.name} becomes {value}"


def _change_description(path, random):
    """Change a word of a text in the tags of a TIFF, such as OME-XML; without a text, any tag."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tags = [tag for page in tiff.pages for tag in page.tags.values() if tag.name == "ImageDescription"]
        if tags:
            tag = _draw(random, tags)
            text, change = _changed(tag.value, random)
            tag.overwrite(text.encode())
            return f"tag {tag.name}: {change}"
    return _change_tag(path, random)


def _change_text(path, random):
    """Change a word of a text file."""
    text, change = _changed(path.read_text(), random)
    path.write_text(text)
    return change


def _changed(text, random):
    """(the text with another value for one of its words, the change)."""
    word = _draw(random, list(re.finditer(r"[\w.]+", text)))
    after = str(_draw(random, ["", *_VALUES]))
    return text[: word.start()] + after + text[word.end() :], f"{word.group()!r} at {word.start()}: {after!r}"


if __name__ == "__main__":
    number, folder = int(sys.argv[1]), Path(sys.argv[2])
    shutil.rmtree(folder, ignore_errors=True)
    print(mutate(number, folder))
