"""Give each image a place of its own for its output, and find it again however the image is named.

    <place>.cellseg/owner.json             the image that a place belongs to
    OUT/.cellseg/places/<hash>.json        the place below the folder ``output`` of each image that it holds

An image is known by its real path, or by its URL.  Its path relative to the folder of the place says whether a place
belongs to it, so data and output that were moved together, or are seen below another mount point, still belong
together.  The absolute path decides if the relative one leads nowhere, as after a move of the output alone.  Notes are
created once and never changed; of two runs, the one that creates a note first has the place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cellseg_batch.engine.errors import OutputError
from cellseg_batch.engine.slides.discover import JOURNAL_SUFFIX, OUTPUT_SUFFIX, journals_of, with_suffix
from cellseg_batch.engine.slides.slide import real_path
from cellseg_batch.engine.storage.atomic_files import create_once
from cellseg_batch.engine.storage.paths import RemotePath, locate
from cellseg_batch.engine.storage.records import encode_record, read_record

_WHAT = "an output"
_PLACES = "places"


@dataclass(frozen=True)
class Owner:
    """The image that a place belongs to: its path relative to the folder of the place, and its absolute path."""

    relative: str
    absolute: str


@dataclass(frozen=True)
class Kept:
    """The place of an image, relative to the folder ``output``."""

    place: str


@dataclass(frozen=True)
class Place:
    """Where the output of an image goes.

    Attributes:
        store: root of the zarr hierarchy.
        owner: identity of the image, or of the store of images, that it belongs to.
        home: folder that the notes are relative to.
        is_mirrored: whether the home is the folder ``output``, which keeps a note for each owner.
    """

    store: Path
    owner: str
    home: Path
    is_mirrored: bool = False


def place_beside(file: Path) -> Place:
    """The place beside an image: ``<stem>.cellseg.zarr``, or a longer name if another image has that."""
    owner = real_path(str(file))
    home = locate(owner).parent
    name, stem = locate(owner).name, locate(owner).stem
    names = dict.fromkeys((stem, name, f"{name}-{_digest(name)[:8]}"))
    return _choose(
        owner, [home / with_suffix(candidate, OUTPUT_SUFFIX) for candidate in names], home, is_mirrored=False
    )


def place_below(output: Path, owner: str, name: str) -> Place:
    """The place of an image below the folder ``output``: ``name``, or a longer one if another image has that.

    Args:
        output: folder that mirrors the inputs.
        owner: identity of the image or of its store.
        name: path of the place if the image is new there.
    """
    kept = kept_below(output, owner)
    store = output / name
    stores = (store, store.with_name(with_suffix(store.name, f"-{_digest(owner)[:8]}")))
    places = [*([] if kept is None else [kept.store]), *stores]
    return _choose(owner, places, output, is_mirrored=True)


def kept_below(output: Path, owner: str) -> Place | None:
    """The place that an image has below the folder ``output``; None if it has none."""
    for note in _notes(owner, output):
        kept = read_record(note, Kept)
        if kept is not None:
            place = Place(output / kept.place, owner, output, is_mirrored=True)
            if _belongs(place):
                return place
    return None


def stores_below(output: Path) -> Iterator[Path]:
    """The stores of all places below the folder ``output``."""
    for note in sorted((output / JOURNAL_SUFFIX / _PLACES).glob("*.json")):
        with suppress(OutputError):  # of a damaged note; a run of its image names it
            kept = read_record(note, Kept)
            if kept is not None:
                yield output / kept.place


def claim(place: Place) -> bool:
    """Note that a place belongs to its owner; False if another run has been quicker, so that it must be chosen again.

    Raises:
        OutputError: the note cannot be written.
    """
    me = _owner(place.owner, place.home)
    note = _owner_note(place.store)
    if not create_once(note, encode_record(me), _WHAT) and not _belongs(place):
        return False
    if not place.is_mirrored:
        return True
    kept = encode_record(Kept(os.path.relpath(str(place.store), str(place.home))))
    by_relative, by_absolute = _notes(place.owner, place.home)
    if not create_once(by_relative, kept, _WHAT):
        earlier = kept_below(place.home, place.owner)
        if earlier is not None and earlier.store != place.store:  # of a run that knows the image by another name
            note.unlink(missing_ok=True)
            return False
    create_once(by_absolute, kept, _WHAT)
    return True


def seen_from(folder: Path, identity: str) -> str:
    """An identity relative to a folder; the identity itself if only one of the two is on this machine."""
    if ("://" in identity) != isinstance(folder, RemotePath):
        return identity
    return os.path.relpath(identity, str(folder))


def _choose(owner: str, stores: list[Path], home: Path, *, is_mirrored: bool) -> Place:
    """The first store that belongs to the owner, else the first that belongs to nobody.

    Raises:
        OutputError: every store belongs to another image.
    """
    places = [Place(store, owner, home, is_mirrored) for store in stores]
    for place in places:
        if _belongs(place):
            return place
    for place in places:
        if read_record(_owner_note(place.store), Owner) is None:
            return place
    raise OutputError(
        str(stores[0]),
        expected="a place for the output that belongs to no other image",
        found=f"{len(stores)} that do",
        remedy="choose another `output`",
    )


def _belongs(place: Place) -> bool:
    """Whether a note says that the place belongs to its owner."""
    noted = read_record(_owner_note(place.store), Owner)
    if noted is None:
        return False
    me = _owner(place.owner, place.home)
    if noted.relative == me.relative:
        return True
    other = locate(noted.relative) if "://" in noted.relative else place.home / noted.relative
    return noted.absolute == me.absolute and not other.exists()


def _owner(identity: str, home: Path) -> Owner:
    return Owner(seen_from(home, identity), identity)


def _owner_note(store: Path) -> Path:
    return journals_of(store) / "owner.json"


def _notes(owner: str, output: Path) -> Iterator[Path]:
    """The two notes of an image's place: by its relative and by its absolute path."""
    for text in (seen_from(output, owner), owner):
        yield output / JOURNAL_SUFFIX / _PLACES / f"{_digest(text)}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]
