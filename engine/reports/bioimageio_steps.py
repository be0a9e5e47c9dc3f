"""The processing steps of a bioimage.io package as a card says them; what a card cannot say is a ValueError."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.reports.bioimageio_description import TensorFacts
from cellseg_batch.engine.reports.card_draft import NormalisationDraft
from cellseg_batch.engine.reports.expected_output import Ending

Values = NDArray[np.float64]
# Steps whose numbers are the pixels' own.
_STATISTICS = ("zero_mean_unit_variance", "scale_range")
_NEAR = 1e-6


@dataclass(frozen=True)
class Stars:
    """What a package says about the suppression of StarDist's polygons.

    Attributes:
        threshold: probability above which a pixel is the centre of one.
        overlap: as in `cellseg_batch.trainer.card.StarDist`.
    """

    threshold: float
    overlap: float


def normalisation_of(tensor: TensorFacts) -> tuple[NormalisationDraft, tuple[str, ...]]:
    """Return all steps in front of the network as one rule, and what to know of it.

    Raises:
        ValueError: no rule of a card does what they do; it names the step.
    """
    gain, offset = np.ones(1), np.zeros(1)
    statistic: Any = None
    clip: tuple[Values, Values] | None = None
    before = ""
    for number, step in enumerate(tensor.steps):
        name, kwargs = _kind_of(step), step.kwargs
        if name == "ensure_dtype":
            # The first is the image's own type; the graph, which was checked, takes floats.
            if number > 0 and not kwargs.dtype.startswith("float"):
                raise ValueError(f"the step ensure_dtype to {kwargs.dtype} after others")
            continue
        if name in ("scale_linear", "fixed_zero_mean_unit_variance"):
            if statistic is not None:
                raise ValueError(f"the step {name} after {before}")
            factor, term = _affine(tensor, step)
            gain, offset = gain * factor, offset * factor + term
            clip = None if clip is None else (clip[0] * factor + term, clip[1] * factor + term)
        elif name in _STATISTICS:
            if before:
                raise ValueError(f"the step {name} after {before}")
            statistic = step
        elif name == "clip":
            if clip is not None or None in (kwargs.min, kwargs.max):
                raise ValueError("the step clip twice, on one side, or at percentiles")
            clip = np.full(1, kwargs.min), np.full(1, kwargs.max)
        else:
            raise ValueError(f"the step {name}")
        before = name
    clips = clip is not None
    if clip is not None and not all(
        np.allclose(end, value, atol=_NEAR) for end, value in zip(clip, (0, 1), strict=True)
    ):
        raise ValueError("the step clip to other values than those that become 0 and 1")
    if statistic is not None:
        return _statistic(statistic, clips)
    if (gain <= 0).any():
        raise ValueError("the step scale_linear with a gain that is not above 0")
    # Nine digits: what float32 tells apart.
    low, high = (tuple(float(f"{value:.9g}") for value in (end - offset) / gain) for end in (0, 1))
    return NormalisationDraft("fixed" if clips else "linear", low, high, clip=clips), ()


def ending_of(tensor: TensorFacts) -> Ending | Stars:
    """Return the steps behind the network; the tensor of the ending is still to be named.

    Raises:
        ValueError: no card says what they do; it names the step.
    """
    ending, stars = Ending(""), None
    for step in tensor.steps:
        name = _kind_of(step)
        if name == "custom":
            raise ValueError(f"the step custom, which runs code of the package ({step.callable})")
        if ending.threshold is not None and name != "ensure_dtype":
            raise ValueError(f"the step {name} after binarize")
        if name in ("sigmoid", "softmax") and ending.activation == "none":
            if str(getattr(step.kwargs, "axis", "channel")) != "channel":
                raise ValueError(f"the step {name} along {step.kwargs.axis}")
            ending = replace(ending, activation=name)
        elif name == "binarize" and isinstance(step.kwargs.threshold, int | float):
            ending = replace(ending, threshold=float(step.kwargs.threshold))
        elif name == "stardist_postprocessing" and len(step.kwargs.grid) == 2:
            stars = Stars(float(step.kwargs.prob_threshold), float(step.kwargs.nms_threshold))
            if not (0 < stars.threshold < 1 and 0 <= stars.overlap <= 1):
                raise ValueError(f"the step {name} with thresholds that do not lie from 0 to 1")
        elif name != "ensure_dtype":
            raise ValueError(f"the step {name}")
    return stars or ending


def _kind_of(step: Any) -> str:
    """Name of a step in 0.5."""
    name = str(getattr(step, "id", None) or step.name)
    return f"fixed_{name}" if getattr(step.kwargs, "mode", "") == "fixed" else name


def _affine(tensor: TensorFacts, step: Any) -> tuple[Values, Values]:
    """Factor and term of a step that multiplies and adds, for all channels or for each."""
    if _kind_of(step) == "scale_linear":
        return _numbers(tensor, step, "gain"), _numbers(tensor, step, "offset")
    deviation = _numbers(tensor, step, "std")
    if not (deviation > 0).all():
        raise ValueError(f"the step {_kind_of(step)} with a std that is not above 0")
    return 1 / deviation, -_numbers(tensor, step, "mean") / deviation


def _numbers(tensor: TensorFacts, step: Any, field: str) -> Values:
    """One number of a step for all channels, or one for each."""
    kwargs, name = step.kwargs, _kind_of(step)
    values = np.atleast_1d(np.asarray(getattr(kwargs, field), np.float64))
    # 0.5 names the axis along which they lie, 0.4 the others.
    along, others = str(getattr(kwargs, "axis", "channel")), str(getattr(kwargs, "axes", None) or "")
    if len(values) > 1 and (along != "channel" or "c" in others):
        raise ValueError(f"the step {name} with numbers along other axes than the channels")
    if len(values) not in (1, tensor.channels):
        raise ValueError(f"the step {name} with {len(values)} numbers for {tensor.channels} channels")
    return values


def _statistic(step: Any, clips: bool) -> tuple[NormalisationDraft, tuple[str, ...]]:
    """The rule of a step that asks the pixels themselves."""
    name, kwargs = _kind_of(step), step.kwargs
    axes = [str(axis) for axis in kwargs.axes] if kwargs.axes is not None else ["c", "y", "x"]
    letters = {axis[0] for axis in axes}
    if not {"y", "x"} <= letters:
        raise ValueError(f"the step {name} over {', '.join(axes)}")
    if getattr(kwargs, "reference_tensor", None) is not None:
        raise ValueError(f"the step {name} by the values of another tensor")
    whole = getattr(kwargs, "mode", "") == "per_dataset" or "b" in letters
    notes = (f"{name} takes the values of a whole data set; each slide gets its own",) if whole else ()
    joint = "c" in letters
    if name == "scale_range":
        low, high = float(kwargs.min_percentile), float(kwargs.max_percentile)
        return NormalisationDraft("percentile", low, high, joint, clips, per_tile=not whole), notes
    if clips:
        raise ValueError(f"the step clip after {name}")
    return NormalisationDraft("zscore", joint=joint, clip=False, per_tile=not whole), notes
