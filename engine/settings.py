"""Hold the settings of a run in one frozen dataclass, one field per flag of ``cellseg-batch run``.

None means that the user did not choose: the model card, the machine or an unfinished run decides.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from cellseg_batch.engine.backend_table import KNOWN_BACKENDS, KNOWN_PRECISIONS
from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.machine import gpus, visible_gpus

BACKENDS = ("auto", *KNOWN_BACKENDS)
QUEUES = ("slurm", "pbs", "lsf")
SCHEDULERS = ("threads", "processes", *QUEUES)
PRECISIONS = ("auto", *KNOWN_PRECISIONS)
SKIPS = ("auto", "off")
STITCHES = ("crop", "blend")

TILE = 1824
"""Side in px of a square whose area no tile exceeds, by default."""

_BLOCK, _BLOCK_ON_GPU = 2048, 4096
# No machine has use for more, and where there is no room for so many the system ends the process without a reason.
_MOST = {"batch": 1024, "workers": 4096, "threads": 1024}
# No cell is as large, and a block reads this far around itself.
_MOST_EXPANSION = 1000
# Files beside the label group have its name with an ending.
_MOST_NAME_BYTES = 128


def _check_types(settings: ClusterSettings | Settings) -> None:
    """Refuse values whose types are not those in the annotations; an int is a float too, a bool is no number.

    Raises:
        UsageError: a value has another type than its field.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not _has_type(value, kind):
            _refuse(name, _type_name(kind), f"{value!r}", "see cellseg_batch.Settings")


def _has_type(value: object, kind: Any) -> bool:
    if get_origin(kind) is UnionType:
        return any(_has_type(value, member) for member in get_args(kind))
    if get_origin(kind) is tuple:  # of any length
        return isinstance(value, tuple) and all(_has_type(item, get_args(kind)[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _type_name(kind: Any) -> str:
    if get_origin(kind) is UnionType:
        return " or ".join(map(_type_name, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"tuple of {_type_name(get_args(kind)[0])}"
    return "None" if kind is NoneType else str(kind.__name__)


@dataclass(frozen=True)
class ClusterSettings:
    """Resources of the batch job of each worker; None leaves a field to dask-jobqueue's own configuration.

    Attributes:
        queue: queue, or SLURM's partition.
        account: account that is charged; with LSF a project.
        walltime: time limit of the job, such as ``04:00:00``.
        gres: GPUs of the job in the words of the scheduler: ``gpu:1`` (SLURM), ``ngpus=1`` (PBS) or ``num=1`` (LSF).
        cores: cores of the job.
        memory: memory of the job, such as ``16GB``.
        config: a configuration file of dask-jobqueue.
    """

    queue: str | None = None
    account: str | None = None
    walltime: str | None = None
    gres: str | None = None
    cores: int | None = None
    memory: str | None = None
    config: Path | None = None

    def __post_init__(self) -> None:
        """Refuse values of other types.

        Raises:
            UsageError: a value has another type than its field.
        """
        _check_types(self)


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        output: folder that mirrors the inputs; None writes beside or into each input.
        name: name of the label group.
        model: a shipped model's name or a bundle's path.
        backend: one of `BACKENDS`.
        precision: one of `PRECISIONS`.
        device: auto, cpu, or GPUs as `gpus_of` reads them; auto takes the fastest device, and at most one GPU.
        gate: False runs the chosen backend and precision even if they do not agree with the fp32 reference.
        threshold: probability above which a pixel is foreground, in (0, 1); None takes the card's.
        tile: side in px of a square whose area no tile exceeds; the lattice fits the tile to the slide.  None takes
            `TILE`, and for a slide with glass the smaller squares that compute the least of it.
        stitch: one of `STITCHES`.
        margin: px cut from each side of a tile, ``exact`` for the reach of network and decoder; None takes the card's.
        batch: tiles per call of the model.
        block: target side in px of the box that one task writes, rounded to whole tile cores; None as `block_side`.
        workers: blocks in flight, or worker processes if ``scheduler`` is a cluster.
        scheduler: one of `SCHEDULERS`, or the address of a dask scheduler.
        cluster: resources that jobs are asked for.
        threads: threads of the model; None uses every core.
        max_memory: bytes of host memory that the run must stay under; None sets no limit.
        level: resolution to process; None picks the one nearest the model's pixel size.
        pixel_size: µm per px of level 0, in place of the metadata's.
        skip_background: one of `SKIPS`; auto skips tiles of glass, and those without contrast.
        downscale: factor by which images are downscaled for the model; None lets the model's card and the slide decide.
        channel: name or index of the channel with the nuclei; for a model of several stains such as
            "nuclei=DAPI,membrane=1"; None picks by rule.
        axes: axes of the images, such as "cyx"; those that name others themselves are refused, but for TIFFs.
        wells: names or patterns of the wells of plates to process, such as A01 and B*; () takes all.
        fields: names of the fields of each well to process; () takes all.
        instances: write every object with an id of its own instead of the mask.
        objects: measure every instance, and summarise plates; implies instances.
        expand: µm by which nuclei are expanded into cells, px of the level where the pixel size is unknown; implies
            instances; None makes no cells.
        probability: also write the probability image.
        tissue: also write a mask of what is not taken for glass.
        overwrite: replace existing labels of this name.
        retry_failed: process only the images that failed before.
        mask: region to which images are confined, as `slides.region` reads it, or a folder of regions with the names of
            the images; None takes whole images.
        mask_class: name of the class in QuPath whose outlines are the region; None takes all.
        manifest: a CSV file that lists the images, as `slide_list.read_rows` reads it, in place of inputs.
        shard: part of the images to process, such as 0/4 to 3/4, as `shard_numbers` reads it; None takes all.
    """

    output: Path | None = None
    name: str = "cellseg"
    model: str = "nuclei"
    backend: str = "auto"
    precision: str = "auto"
    device: str = "auto"
    gate: bool = True
    threshold: float | None = None
    tile: int | None = None
    stitch: str = "crop"
    margin: int | str | None = None
    batch: int = 1
    block: int | None = None
    workers: int = 3
    scheduler: str = "threads"
    cluster: ClusterSettings = ClusterSettings()
    threads: int | None = None
    max_memory: int | None = None
    level: int | None = None
    pixel_size: float | None = None
    skip_background: str = "auto"
    downscale: int | None = None
    channel: int | str | None = None
    axes: str | None = None
    wells: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    instances: bool = False
    objects: bool = False
    expand: float | None = None
    probability: bool = False
    tissue: bool = False
    overwrite: bool = False
    retry_failed: bool = False
    mask: Path | None = None
    mask_class: str | None = None
    manifest: Path | None = None
    shard: str | None = None

    @property
    def makes_ids(self) -> bool:
        """Whether labels are ids of objects instead of a mask."""
        return self.instances or self.objects or self.expand is not None

    @property
    def skips_background(self) -> bool:
        """Whether tiles that show nothing are not computed; blending takes the logits of all tiles around one."""
        return self.skip_background == "auto" and self.stitch == "crop"

    def __post_init__(self) -> None:
        """Refuse values that are wrong for every slide and every model.

        Raises:
            UsageError: a value is out of range, or has another type than its field.
        """
        _check_types(self)
        _one_of("backend", self.backend, BACKENDS)
        if self.scheduler not in SCHEDULERS and "://" not in self.scheduler:
            expected = f"{', '.join(SCHEDULERS)} or an address such as tcp://host:8786"
            _refuse("scheduler", expected, self.scheduler, "leave it out for the threads of this machine")
        asked = [f"`{one.name}`" for one in fields(self.cluster) if getattr(self.cluster, one.name) is not None]
        if asked and self.scheduler not in QUEUES:
            remedy = f"name the cluster's, or leave out {', '.join(asked)}"
            _refuse(
                "scheduler",
                f"one of {', '.join(QUEUES)}, whose jobs have a queue and resources",
                self.scheduler,
                remedy,
            )
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("stitch", self.stitch, STITCHES)
        _one_of("skip_background", self.skip_background, SKIPS)
        if self.device not in ("auto", "cpu"):
            gpus_of(self.device)
        if self.makes_ids and self.stitch != "crop":
            _refuse(
                "instances", "`stitch=crop`: seeds come from single tiles", f"`stitch={self.stitch}`", "leave it out"
            )
        if self.tissue and not self.skips_background:
            found = f"`stitch={self.stitch}`" if self.skip_background == "auto" else "`skip_background=off`"
            _refuse("tissue", "a run that skips background", found, "leave it out; no glass is looked for there")
        if self.threshold is not None and not 0 < self.threshold < 1:
            _refuse("threshold", "a probability between 0 and 1, both excluded", self.threshold, "try 0.5")
        if isinstance(self.margin, str) and self.margin != "exact":
            _refuse("margin", "a number of px or the word exact", self.margin, "leave it out for the model's own")
        if isinstance(self.margin, int) and self.margin < 0:
            _refuse("margin", "0 px or more", self.margin, "leave it out for the model's own, or `margin=exact`")
        for name in ("tile", "batch", "block", "workers", "threads", "max_memory", "downscale"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MOST.get(name, math.inf):
                most = f", and at most {_MOST[name]}" if name in _MOST else ""
                _refuse(name, f"1 or more{most}", value, "leave it out for the default")
        if self.level is not None and self.level < 0:
            _refuse("level", "0 (full resolution) or more", self.level, "see cellseg-batch info for the levels")
        if self.pixel_size is not None and not 0 < self.pixel_size < math.inf:
            _refuse("pixel_size", "a finite number of µm per px above 0", self.pixel_size, "try 0.5")
        if self.expand is not None and not 0 < self.expand <= _MOST_EXPANSION:
            expected = f"µm above 0, and at most {_MOST_EXPANSION}"
            _refuse("expand", expected, self.expand, "try 5, or leave it out for nuclei alone")
        if self.mask_class is not None and self.mask is None and self.manifest is None:
            _refuse("mask_class", "a region with `mask`", "none", "name the GeoJSON file, or leave the class out")
        if self.shard is not None:
            shard_numbers(self.shard)
        check_name(self.name)

    def block_side(self, backend: str | None = None) -> int:
        """Target side of a block in px: larger for a GPU, for which reading margins and chunks twice takes too long.

        Args:
            backend: name of the backend that computes it; None if none is chosen yet: then a GPU is expected if the
                settings name one, or leave the choice to a machine that has one.
        """
        if self.block is not None:
            return self.block
        if backend is None and self.backend != "auto":
            backend = self.backend
        if backend is not None:
            on_gpu = KNOWN_BACKENDS[backend].on_gpu
        else:
            on_gpu = self.device != "cpu" and bool(gpus() and visible_gpus())
        return _BLOCK_ON_GPU if on_gpu else _BLOCK


def check_name(name: str) -> None:
    """Refuse a name that a label group and the files beside it cannot have.

    Raises:
        UsageError: it is empty, too long, no plain text, a path or hidden, or that of a zarr group's own file.
    """
    is_text = name.isprintable() and name == name.strip()
    is_free = not set(name) & set("/\\") and name[:1] not in ("", ".") and name != "zarr.json"
    if not (is_text and is_free and len(name.encode()) <= _MOST_NAME_BYTES):
        expected = f"a plain name of at most {_MOST_NAME_BYTES} bytes for the label group"
        _refuse("name", expected, ascii(name), "try `name=nuclei`")


def gpus_of(device: str) -> tuple[str, ...]:
    """The GPUs that ``cuda``, ``cuda:1`` or ``cuda:0,1`` names, counted among those that CUDA_VISIBLE_DEVICES shows.

    ``cuda``, ``auto`` and ``cpu`` give the first GPU.

    Raises:
        UsageError: ``device`` is none of these.
    """
    if device in ("auto", "cpu", "cuda"):
        return ("cuda:0",)
    if not re.fullmatch(r"cuda:\d+(,\d+)*", device):
        _refuse("device", "auto, cpu, cuda, cuda:0 or cuda:0,1", device, "see cellseg-batch doctor")
    numbers = device.removeprefix("cuda:").split(",")
    return tuple(f"cuda:{int(number)}" for number in dict.fromkeys(numbers))


def shard_numbers(shard: str) -> tuple[int, int]:
    """The number of a part, from 0 on, and the number of all parts, that a text such as ``0/4`` names.

    Raises:
        UsageError: it names no part.
    """
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard, re.ASCII)
    number, count = map(int, found.groups()) if found else (0, 0)
    if number >= count:
        _refuse("shard", "I/N with I from 0 to N - 1, such as 0/4 to 3/4", shard, "arrays that begin at 1 need I - 1")
    return number, count


def race_device(device: str) -> str:
    """The device that the backends are raced on: the first GPU stands for all."""
    return device if device in ("auto", "cpu") else gpus_of(device)[0]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        _refuse(name, f"one of {', '.join(allowed)}", value, "see cellseg-batch doctor for what this machine has")


def _refuse(name: str, expected: str, found: object, remedy: str) -> None:
    raise UsageError(f"`{name}`", expected=expected, found=str(found), remedy=remedy)
