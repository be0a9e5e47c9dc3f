"""Segment cells and nuclei in microscopy slides, from Python.

    from cellseg_batch import load_model, open_labels, read_objects, segment

    report = segment("slides.zarr", model="nuclei", objects=True, output="out")
    labels = open_labels(report.slides[0])
    table = read_objects(report.slides[0])

    model = load_model("nuclei")
    ids = model.segment(array, pixel_size=0.25)

`segment` runs what ``cellseg-batch run`` runs, with the same bits; a `Model` segments arrays in memory as a run would
segment an image of these pixels.  No function prints, takes signals or changes the environment.  What cannot be done at
all raises a `CellsegError` that says what was expected, what was found and what to do; an image that fails among others
raises nothing, and has the status ``failed`` and a reason in its `SlideReport`.  A remark on an array, such as on its
NaN pixels, is a `CellsegWarning`; those on images are `SlideReport.notes`.  Libraries are imported when needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow
    import zarr
    from numpy.typing import NDArray

    from cellseg_batch.engine.errors import CellsegError, CellsegWarning
    from cellseg_batch.engine.inference.model_pool import ModelPool
    from cellseg_batch.engine.run.results import EndedTask, PlateReport, RunReport, SlideReport
    from cellseg_batch.engine.run.slide_plan import SlidePlan
    from cellseg_batch.engine.settings import Settings

# Python started in a clone finds this folder first, and the engine where the package is installed.
__path__ = extend_path(__path__, __name__)

__all__ = [
    "CellsegError",
    "CellsegWarning",
    "Model",
    "PlateReport",
    "Progress",
    "RunReport",
    "Settings",
    "SlideReport",
    "load_model",
    "open_labels",
    "read_objects",
    "segment",
]

_LAZY = {
    "CellsegError": "cellseg_batch.engine.errors",
    "CellsegWarning": "cellseg_batch.engine.errors",
    "Settings": "cellseg_batch.engine.settings",
    "PlateReport": "cellseg_batch.engine.run.results",
    "RunReport": "cellseg_batch.engine.run.results",
    "SlideReport": "cellseg_batch.engine.run.results",
}

# The settings of `load_model`.  The others say where a run reads and writes, what it writes, or where it computes.
_ARRAY_SETTINGS = (
    "backend",
    "precision",
    "device",
    "gate",
    "threshold",
    "tile",
    "margin",
    "batch",
    "block",
    "workers",
    "threads",
    "max_memory",
    "pixel_size",
    "skip_background",
    "downscale",
    "channel",
)


def __getattr__(name: str) -> Any:
    """Import the classes of results and settings when they are asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


@dataclass(frozen=True)
class Progress:
    """The progress of `segment`.

    Attributes:
        images: number of images to process.
        ended: number of these that are done, skipped, failed or held.
        pixels: number of pixels of the slides that have begun, over all planes.
        pixels_done: number of these that are done; each pass over a slide counts as a share of its pixels.
        ending: report of the slide that has just ended; None if the step is another one.
    """

    images: int = 0
    ended: int = 0
    pixels: int = 0
    pixels_done: float = 0.0
    ending: SlideReport | None = None


def segment(
    slides: str | PathLike[str] | Iterable[str | PathLike[str]] = (),
    *,
    progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> RunReport:
    """Segment every image that ``slides`` hold, as ``cellseg-batch run`` does; an unfinished run goes on.

    Args:
        slides: path or URL of an image, a store or a folder of them, or several; none with a ``manifest``.
        progress: called in this thread at every step; an exception that it raises ends the run, whose
            finished work stays.
        settings: fields of `Settings`, which are the flags of ``cellseg-batch run``: ``model``, ``output``,
            ``objects``, ``pixel_size``, ``precision`` and so on.  A path may be text, and ``wells`` and ``fields`` a
            single name or several.

    Returns:
        The report of the run; `RunReport.slides` has an entry for each image, failed ones with their reasons.

    Raises:
        CellsegError: the run cannot start with these slides and settings.
    """
    from cellseg_batch.engine.errors import UsageError
    from cellseg_batch.engine.run.campaign import run
    from cellseg_batch.engine.settings import Settings
    from cellseg_batch.engine.storage.paths import locate

    chosen = _settings(settings, [field.name for field in fields(Settings)])
    several = isinstance(slides, Iterable) and not isinstance(slides, (str, bytes, PathLike))
    paths = [_text_of(path, "slides", "paths or URLs") for path in (slides if several else [slides])]
    if not paths and chosen.manifest is None:
        raise UsageError("slides", expected="at least one path or URL", found="none", remedy="name what to segment")
    if not (progress is None or callable(progress)):
        raise UsageError("progress", expected="a function", found=repr(progress), remedy="leave it out, or name one")
    report = run([locate(path) for path in paths], chosen, _Observer(progress))
    if not chosen.objects:
        return report
    from cellseg_batch.engine.reports.plates import summarise_plates

    return summarise_plates(report, chosen)


def load_model(model: str | PathLike[str] = "nuclei", **settings: Any) -> Model:
    """Load a model and compile it for this machine, to segment arrays.

    Args:
        model: a shipped model's name, or the folder of a bundle.
        settings: the fields of `Settings` that matter to arrays, such as ``backend``, ``precision``, ``device``,
            ``threshold`` and ``margin``; ``pixel_size`` and ``channel`` hold for calls without their own.

    Raises:
        CellsegError: there is no such model, no backend fits the settings, or a setting means nothing for arrays.
    """
    from cellseg_batch.engine.inference.model_pool import ModelPool
    from cellseg_batch.engine.models import load_model as load_bundle

    chosen = replace(_settings({"model": model, **settings}, ("model", *_ARRAY_SETTINGS)), instances=True)
    return Model(chosen, ModelPool(load_bundle(chosen.model), chosen, pixels=0))


class Model:
    """A compiled model, as `load_model` makes it.

    Arrays have axes (Y, X) or (Y, X, C) and any integer or floating type.  Three or four channels of uint8 are red,
    green and blue (and alpha); among other channels, ``channel`` is the index of the one with the nuclei.  An array is
    cut into the same tiles as an image of its size in a run, and normalised as a whole.  An array of more channels than
    rows or columns is refused: its axes are likely (C, Y, X).

    Args:
        settings: settings of every call; a call's own pixel size and channel come first.
        model_pool: model pool for instances; it keeps compiled models from call to call.
    """

    def __init__(self, settings: Settings, model_pool: ModelPool) -> None:
        self._settings = settings
        self._model_pools = {True: model_pool}

    def segment(self, array: NDArray[Any], pixel_size: float | None = None, channel: int | None = None) -> NDArray[Any]:
        """Segment the objects of an image.

        Args:
            array: (Y, X) or (Y, X, C).
            pixel_size: µm per px; None takes the model's setting, and is unknown without one.
            channel: index of the channel with the nuclei; None takes the model's setting, or chooses as a run does.

        Returns:
            (Y, X) uint32 (uint64 beyond 4 thousand million objects), 0 for background and 1, 2, ... for objects.

        Raises:
            CellsegError: the array is no image, or not one for this model.

        Warns:
            CellsegWarning: a remark on the array, such as on NaN pixels, which are taken as 0.
        """
        return self._run(array, pixel_size, channel, instances=True)

    def probability(
        self, array: NDArray[Any], pixel_size: float | None = None, channel: int | None = None
    ) -> NDArray[Any]:
        """Compute the probability of each pixel to be foreground.

        Args:
            array: (Y, X) or (Y, X, C).
            pixel_size: as in `segment`.
            channel: as in `segment`.

        Returns:
            (Y, X) uint8, 0 for a probability of 0 and 255 for 1.

        Raises:
            CellsegError: the array is no image, or not one for this model.

        Warns:
            CellsegWarning: as in `segment`.
        """
        return self._run(array, pixel_size, channel, instances=False)

    def _run(self, array: NDArray[Any], pixel_size: float | None, channel: int | None, instances: bool) -> NDArray[Any]:
        """Compute the labels of an array, or its probability, with a campaign that writes to a temporary folder."""
        import tempfile
        import warnings
        from pathlib import Path

        import numpy as np
        import zarr

        from cellseg_batch.engine.errors import CellsegWarning, SlideError
        from cellseg_batch.engine.run.campaign import run_images
        from cellseg_batch.engine.slides.arrays import HeldArray

        with HeldArray(array) as slide, tempfile.TemporaryDirectory(prefix="cellseg-array-") as folder:
            settings = replace(
                self._settings,
                output=Path(folder),
                pixel_size=self._settings.pixel_size if pixel_size is None else _plain(pixel_size),
                channel=self._settings.channel if channel is None else _plain(channel),
                instances=instances,
                probability=not instances,
            )
            report = run_images([slide], settings, _Observer(None), model_pool=self._model_pool(settings))
            (outcome,) = report.slides
            if outcome.status != "done":
                raise SlideError.with_detail("array", outcome.reason)
            for note in outcome.notes:
                warnings.warn(f"array: {note}", CellsegWarning, stacklevel=3)
            group = outcome.outputs["labels" if instances else "probability"]
            return np.asarray(zarr.open_array(f"{group}/0", mode="r")[...])

    def _model_pool(self, settings: Settings) -> ModelPool:
        """The model pool for instances, or for the probability alone, which needs fewer outputs of the network."""
        from cellseg_batch.engine.inference.model_pool import ModelPool

        if settings.instances not in self._model_pools:
            objects = self._model_pools[True]
            self._model_pools[settings.instances] = ModelPool(objects.bundle, settings, choice=objects.choice)
        return self._model_pools[settings.instances]


def open_labels(slide: SlideReport | str | PathLike[str], level: int = 0) -> zarr.Array[Any]:
    """Open the labels of a slide; pixels are read as the array is sliced.

    Args:
        slide: a slide of a report, or the path of a label group.
        level: level of the label pyramid; 0 is the resolution that was segmented.

    Returns:
        An array with the slide's axes out of (T, Z, Y, X).  Foreground is 1 in a mask, the number of its class for a
        model of classes, and ids of objects otherwise.

    Raises:
        CellsegError: the slide has no labels, or no such level.
    """
    import zarr

    from cellseg_batch.engine.errors import ReadError
    from cellseg_batch.engine.slides.ome_zarr import open_written
    from cellseg_batch.engine.storage.paths import locate, zarr_store

    path = locate(_output_of(slide, "labels"))
    levels = [written.path for written in open_written(path, "").levels]
    if str(level) not in levels:
        raise ReadError(
            str(path),
            expected=f"one of the levels {', '.join(levels)}",
            found=f"`level={level}`",
            remedy="choose one of these",
        )
    return zarr.open_array(zarr_store(path / str(level)), mode="r")


def read_objects(slide: SlideReport | str | PathLike[str]) -> pyarrow.Table:
    """Read the table of objects of a slide that was segmented with ``objects=True``.

    Args:
        slide: a slide of a report, or the path of its table (``SlideReport.table``).

    Returns:
        One row per object; ``table.to_pandas()`` and ``polars.from_arrow(table)`` make data frames of the table.

    Raises:
        CellsegError: the slide has no table, or the file is none.
    """
    import pyarrow

    from cellseg_batch.engine.objects.table import read_batches, read_provenance
    from cellseg_batch.engine.storage.paths import locate

    path = locate(_output_of(slide, "table"))
    read_provenance(path)  # raises what is no table of objects
    return pyarrow.Table.from_batches(list(read_batches(path)))


def _output_of(slide: SlideReport | str | PathLike[str], output: Literal["labels", "table"]) -> str:
    """The path of an output, given by a slide of a report or by itself.

    Raises:
        UsageError: ``slide`` is neither.
        SlideError: the slide has no such output.
    """
    from cellseg_batch.engine.errors import SlideError
    from cellseg_batch.engine.run.results import SlideReport

    if not isinstance(slide, SlideReport):
        return _text_of(slide, "slide", "a slide of a report, or a path")
    path = slide.labels if output == "labels" else slide.table
    if path is None:
        raise SlideError(
            slide.path,
            expected=f"a slide with {'labels' if output == 'labels' else 'a table of objects'}",
            found=slide.reason or f"none ({slide.status})",
            remedy="segment it, with objects=True for a table",
        )
    return path


def _text_of(path: object, name: str, expected: str) -> str:
    """A path as text.

    Args:
        path: the path.
        name: name of the argument.
        expected: what the argument may be.

    Raises:
        UsageError: ``path`` is none.
    """
    from cellseg_batch.engine.errors import UsageError

    if not isinstance(path, (str, PathLike)):
        raise UsageError(name, expected=expected, found=repr(path), remedy="give it as text or as a pathlib.Path")
    return str(path)


def _settings(values: dict[str, Any], allowed: Sequence[str]) -> Settings:
    """Make settings from keyword arguments.

    Args:
        values: name -> value.  A path may be text, ``wells`` and ``fields`` one name or number or several of these.
        allowed: names of the settings that mean something.

    Raises:
        UsageError: there is no such setting, it means nothing here, or its value is out of range or of another type.
    """
    from difflib import get_close_matches

    from cellseg_batch.engine.errors import UsageError
    from cellseg_batch.engine.settings import Settings
    from cellseg_batch.engine.storage.paths import locate

    for name in values:
        if name not in allowed:
            is_other = any(field.name == name for field in fields(Settings))
            likely = [] if is_other else get_close_matches(name, allowed, 1)
            raise UsageError(
                name,
                expected=f"one of the settings {', '.join(allowed)}",
                found=name,
                remedy=f"did you mean {likely[0]}?" if likely else "leave it out",
            )
    values = {name: _plain(value) for name, value in values.items()}
    for name in ("output", "manifest", "mask"):
        if isinstance(values.get(name), (str, PathLike)):
            values[name] = locate(str(values[name]))
    if isinstance(values.get("model"), PathLike):
        values["model"] = str(values["model"])
    for name in ("wells", "fields"):
        chosen = values.get(name)
        if chosen is not None:
            several = isinstance(chosen, Iterable) and not isinstance(chosen, (str, bytes))
            items = [_plain(item) for item in (chosen if several else [chosen])]
            values[name] = tuple(str(item) if type(item) is int else item for item in items)
    return Settings(**values)


def _plain(value: Any) -> Any:
    """A number of numpy as one of Python; any other value as it is."""
    import numpy as np

    return value.item() if isinstance(value, np.generic) else value


class _Observer:
    """Turns the events of a run into `Progress`."""

    def __init__(self, tell: Callable[[Progress], None] | None) -> None:
        self._tell = tell
        self._images = self._ended = self._pixels = 0
        self._done = 0.0

    def racing(self) -> None:
        """The backends are raced."""

    def compiling(self) -> None:
        """A network or a kernel is compiled."""

    def found(self, images: int, pixels: Mapping[str, int]) -> None:
        """So many images will be processed."""
        self._images = images
        self._say()

    def planned(self, plan: SlidePlan, peak_bytes: int, number: int, done: float) -> None:
        """A slide is about to start."""
        self._pixels += plan.pixels
        self._done += done
        self._say()

    def advanced(self, task: EndedTask) -> None:
        """So many more pixels are done."""
        self._done += task.pixels
        self._say()

    def ended(self, report: SlideReport) -> None:
        """A slide has ended."""
        self._ended += 1
        self._say(report)

    def _say(self, ending: SlideReport | None = None) -> None:
        if self._tell is not None:
            self._tell(Progress(self._images, self._ended, self._pixels, self._done, ending))
