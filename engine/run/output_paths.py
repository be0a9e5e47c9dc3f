"""Choose the paths of a slide's output.

Labels go into an OME-Zarr image itself, into a companion store beside any other image, or below the folder of the
setting ``output``, which mirrors the inputs.  `places` keeps every place for one image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from cellseg_batch.engine.errors import OutputError, UsageError
from cellseg_batch.engine.run.places import Place, kept_below, place_below, place_beside
from cellseg_batch.engine.slides.discover import journals_of
from cellseg_batch.engine.slides.ome_zarr import is_zarr_node, zarr_root
from cellseg_batch.engine.slides.slide import Slide, real_path
from cellseg_batch.engine.storage.lock import LOCK_SUFFIX
from cellseg_batch.engine.storage.paths import RemotePath, is_web, locate

TABLE_NAME = "objects.parquet"
"""File of the table of objects, in the folder of the journal."""


@dataclass(frozen=True)
class OutputPaths:
    """The zarr groups that a slide's output is written to.

    Attributes:
        store: root of the zarr hierarchy that holds the labels.
        image: path of the image's group inside it.
        name: name of the label group.
        zarr_format: 2 for OME-Zarr 0.4, 3 for 0.5.
        source: path from the label group to the segmented image; None if that is no zarr group.
        place: the image's place, whose store holds the labels unless the image holds them, and all other output images.
    """

    store: Path
    image: str
    name: str
    zarr_format: Literal[2, 3]
    source: str | None
    place: Place

    @property
    def companion(self) -> Path:
        """Root of the store for output images that are no labels."""
        return self.place.store

    @property
    def labels(self) -> str:
        """Path of the label group inside the store."""
        return "/".join(part for part in (self.image, "labels", self.name) if part)

    @property
    def cells(self) -> str:
        """Path of the label group of cells inside the store."""
        return f"{self.labels}_cells"

    @property
    def tissue(self) -> str:
        """Path of the label group of the mask of tissue inside the store."""
        return f"{self.labels}_tissue"

    @property
    def labels_folder(self) -> Path:
        """The label group on disk."""
        return self.store / self.labels

    def in_companion(self, image: str) -> str:
        """Path of the output image ``image`` inside the companion store."""
        return "/".join(part for part in (self.image, f"{self.name}_{image}") if part)

    @property
    def table(self) -> Path:
        """File of the table of objects."""
        return self.journal / TABLE_NAME

    @property
    def journal(self) -> Path:
        """Folder of the journal, beside the store: a foreign folder inside it could confuse readers."""
        return self._beside / self.labels

    @property
    def plate(self) -> Path:
        """Folder of the plate's summary, for an image that is a field <plate>/<row>/<column>/<field> of a plate."""
        return self._beside / PurePosixPath(*PurePosixPath(self.image).parts[:-3]) / f"{self.name}.plate"

    @property
    def _beside(self) -> Path:
        return journals_of(self.store)

    @property
    def lock(self) -> Path:
        """Lock file that names the run at work on the output."""
        return self.journal.with_name(self.name + LOCK_SUFFIX)


def output_paths(slide: Slide, name: str, output: Path | None) -> OutputPaths:
    """Choose the paths of a slide's output: those that the image has, however it is named now, or new ones.

    Args:
        slide: the image.
        name: name of the label group.
        output: folder that mirrors the inputs; None writes into or beside the image.

    Raises:
        OutputError: ``output`` would mirror the input onto itself, or cannot be written to.
    """
    zarr_format: Literal[2, 3] = 2 if slide.holds_labels and slide.zarr_format == 2 else 3
    base = slide.store if output is None else output / "below"
    if isinstance(base, RemotePath) and (is_web(base) or not base.key):
        raise OutputError(
            str(base),
            expected="a folder or bucket that can be written to, and something beside it",
            found="a web server" if is_web(base) else "a bucket that is one store as a whole",
            remedy="name a folder with `output`, here or in another bucket",
        )
    if output is None:
        beside = place_beside(slide.store)
        if slide.holds_labels:
            return OutputPaths(slide.store, slide.path, name, zarr_format, "../../", beside)
        return OutputPaths(beside.store, slide.path, name, zarr_format, None, beside)
    place, image = _mirrored(slide, output.resolve())
    real_store = locate(real_path(str(slide.store)))
    if place.store == real_store or real_store in place.store.parents or place.store in real_store.parents:
        raise OutputError(
            str(place.store),
            expected="a folder apart from the input",
            found=f"the input {slide.store} itself",
            cause=f"`output={output}` is the folder that the input lies in",
            remedy="choose another folder, or leave `output` out to write labels in place",
        )
    source = _source(slide, place.store / image / "labels" / name)
    return OutputPaths(place.store, image, name, zarr_format, source, place)


def _mirrored(slide: Slide, output: Path) -> tuple[Place, str]:
    """The place of a slide below ``output``, and the path of its image in it."""
    store, identity = real_path(str(slide.store)), slide.identity
    inside = identity.removeprefix(store).strip("/").split("/") if identity != store else []
    for depth in range(len(inside), -1, -1):  # an earlier run may have been given a group of the store
        place = kept_below(output, "/".join([store, *inside[:depth]]))
        if place is not None:
            return place, "/".join(inside[depth:])
    below = f"/{slide.path}"
    if not slide.path:
        root, image = slide.name, ""
    elif slide.name.endswith(below):
        root, image = slide.name.removesuffix(below), slide.path
    else:  # the input is a group inside its store
        root, _, image = slide.name.partition("/")
    return place_below(output, identity.removesuffix(f"/{image}") if image else identity, root), image


def _source(slide: Slide, labels: Path) -> str | None:
    """Path from the label group to the segmented image; None if there is no relative path, or no zarr group."""
    both_local_or_remote = isinstance(slide.store, RemotePath) == isinstance(labels, RemotePath)
    return os.path.relpath(slide.location, str(labels)) if slide.holds_labels and both_local_or_remote else None


def refuse_unwritable(output: Path | None) -> None:
    """Refuse an output folder that cannot be made or written, before any work.

    Raises:
        UsageError: it, or the folder that it is to be made in, is a file or may not be written.
    """
    if output is None or isinstance(output, RemotePath):
        return
    parent = next(path for path in (output.absolute(), *output.absolute().parents) if os.path.lexists(path))
    if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
        return
    raise UsageError(
        f"`output={output}`",
        expected="a folder that can be written, or made",
        found=f"{parent}, which is {'read-only' if parent.is_dir() else 'no folder'}",
        remedy="choose another folder, or leave `output` out to write labels in place",
    )


def refuse_output_inside(output: Path | None, inputs: Sequence[Path]) -> None:
    """Refuse an output folder inside an input: the next run would take its content for images.

    Raises:
        UsageError: the folder is inside an input.
    """
    if output is None:
        return
    for path in inputs:
        root = zarr_root(path.resolve())[0] if is_zarr_node(path) else path.resolve()
        if output.resolve().is_relative_to(root):
            raise UsageError(
                f"`output={output}`",
                expected="a folder outside every input",
                found=f"one inside {path}",
                remedy="choose another folder, or leave `output` out to write labels in place",
            )
