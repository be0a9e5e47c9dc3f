"""Read zarr hierarchies in zip archives, which nothing is written into; the labels of their images lie beside them.

Sources: zarr's ZipStore; RFC-9 of the OME-Zarr specification (.ozx). A hierarchy begins at the archive's root, or in a
folder there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from cellseg_batch.engine.errors import ReadError
from cellseg_batch.engine.slides.image_format import Search, reading_by
from cellseg_batch.engine.slides.ome_zarr import Zarr, images_in, is_zarr_node
from cellseg_batch.engine.slides.slide import Slide, UnreadableImage
from cellseg_batch.engine.storage.archives import SUFFIXES, ArchivedPath, is_archive
from cellseg_batch.engine.storage.paths import RemotePath


class ZippedZarr(Zarr):
    """Format of zarr hierarchies in zip archives."""

    name: ClassVar[str] = "zipped zarr"
    title: ClassVar[str] = "zarr.zip"
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES

    def can_open(self, path: Path) -> bool:
        """Whether a file on this machine is an archive by its name."""
        return not isinstance(path, RemotePath) and is_archive(path)

    def find(self, path: Path, name: str, search: Search) -> Iterator[Slide | UnreadableImage]:
        """Find every image in an archive.

        Raises:
            ReadError: it is no archive, or there is no hierarchy in it.
        """
        archive = ArchivedPath(path)
        with reading_by("zipfile", path):
            inside = [""] if is_zarr_node(archive) else [node.name for node in archive.iterdir() if is_zarr_node(node)]
        if not inside:
            raise ReadError(
                str(path),
                expected="a zarr group or array at the root of the archive, or in a folder there",
                found="none",
                remedy="unpack it, and pack the content of the store",
            )
        for node in inside:
            for image in images_in(archive, node, f"{name}/{node}" if node else name, search, None):
                yield _in_file(image, path) if isinstance(image, Slide) else image

    def sample_files(self, slide: Slide, level: int) -> Iterator[Path]:
        """The archive."""
        yield slide.store

    def describe(self, slide: Slide) -> str:
        """Name of the format."""
        return self.name


def _in_file(slide: Slide, path: Path) -> Slide:
    """An image of an archive as one of a file: nothing can be written beside its pixels."""
    return replace(slide, store=path, format=ZippedZarr.name, zarr_format=None, holds_labels=False)
