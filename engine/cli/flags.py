"""Commands that take `Settings`: the flags of its fields are added to a command, and it gets what they say.

Knows no command; a field's flag is written in `cellseg_batch.engine.cli.options`, its default in `Settings`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from cellseg_batch.engine.cli import options as o
from cellseg_batch.engine.cli.console import plain_errors
from cellseg_batch.engine.settings import ClusterSettings, Settings

_FLAGS: dict[str, Any] = {
    "output": o.Output,
    "name": o.Name,
    "model": o.Model,
    "backend": o.BackendName,
    "precision": o.Precision,
    "device": o.Device,
    "gate": o.Gate,
    "threshold": o.Threshold,
    "threads": o.Threads,
    "tile": o.TileSide,
    "stitch": o.Stitch,
    "margin": o.Margin,
    "batch": o.BatchSize,
    "block": o.BlockSide,
    "workers": o.Workers,
    "scheduler": o.Scheduler,
    "max_memory": o.MaxMemory,
    "level": o.LevelIndex,
    "pixel_size": o.PixelSize,
    "downscale": o.Downscale,
    "skip_background": o.SkipBackground,
    "channel": o.Channel,
    "axes": o.Axes,
    "wells": o.Wells,
    "fields": o.Fields,
    "instances": o.Instances,
    "objects": o.Objects,
    "probability": o.Probability,
    "overwrite": o.Overwrite,
    "retry_failed": o.RetryFailed,
}
_CLUSTER_FLAGS: dict[str, Any] = {
    "queue": o.Queue,
    "account": o.Account,
    "walltime": o.Walltime,
    "gres": o.Gres,
    "cores": o.Cores,
    "memory": o.JobMemory,
    "config": o.ClusterConfig,
}

ENGINE = ("model", "backend", "precision", "device", "gate", "threads")
TILES = ("tile", "stitch", "margin", "batch", "block", "workers")
SLIDE = ("level", "pixel_size", "downscale", "skip_background", "channel", "axes")
EVERY = (*_FLAGS, "cluster")

Command = Callable[..., None]


def takes_settings(*names: str) -> Callable[[Command], Command]:
    """Give a command the flags of these fields of `Settings`, and hand it what they say as ``settings``.

    ``cluster`` stands for all fields of `ClusterSettings`.  The command gets --debug too, and an error of ours ends
    it on one line.
    """
    cluster = tuple(_CLUSTER_FLAGS) if "cluster" in names else ()
    plain = tuple(name for name in names if name != "cluster")
    flags = [
        # Nothing is said by default for what is empty, and the help shows none.
        *(_parameter(name, _FLAGS[name], getattr(Settings, name) or None) for name in plain),
        *(_parameter(name, _CLUSTER_FLAGS[name], None) for name in cluster),
        _parameter("debug", o.Debug, False),
    ]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def filled(**given: Any) -> None:
            with plain_errors(given.pop("debug")):
                said = {name: value for name in plain if (value := given.pop(name)) is not None}
                if cluster:
                    said["cluster"] = ClusterSettings(**{name: given.pop(name) for name in cluster})
                command(**given, settings=Settings(**said))

        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [_parameter(one.name, one.annotation, one.default) for one in own if one.name != "settings"]
        arguments = [one for one in kept if one.default is inspect.Parameter.empty]
        parameters = [*arguments, *flags, *kept[len(arguments) :]]
        filled.__annotations__ = {one.name: one.annotation for one in parameters}
        filled.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return filled

    return decorate


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
