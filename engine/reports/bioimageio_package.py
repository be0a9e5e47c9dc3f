"""Read a bioimage.io package (RDF 0.4 and 0.5): its ONNX weights, its test tensors, and the draft of a card.

The library ``bioimageio.spec`` validates the description, without looking at files or addresses.  The two versions are
read each as it is: the library's own conversion from 0.4 loses hashes and refuses outputs of one size with a halo.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import ModelError, brief
from cellseg_batch.engine.inference.onnx_file import EXPORT, LARGEST, GraphFile
from cellseg_batch.engine.reports.card_draft import CardDraft, InputDraft, NormalisationDraft, OutputDraft
from cellseg_batch.engine.reports.expected_output import ExpectedOutput, Steps
from cellseg_batch.engine.reports.package_files import PackageFiles
from cellseg_batch.engine.slides.pixel_size import settle_pixel_size
from cellseg_batch.trainer.card import BACKGROUND, LAYOUTS, Size, StarDist

_LAYOUT_OF = dict(zip(("bcyx", "byxc"), LAYOUTS, strict=True))
_LARGEST_DESCRIPTION, _MOST_VALUES = 1 << 20, 100_000
# Bytes of a test tensor that a bundle keeps.
LARGEST_TEST = 32 << 20
# Channel names by which writers of packages say nothing.
_NO_NAME = re.compile(r"(channel|ch|c)?[ _-]?\d*", re.IGNORECASE)
_RGB = (("r", "g", "b"), ("red", "green", "blue"))
_TAKE_OUT = "take the .onnx file out of the package, and say the rest in a card.toml"
_NEAR = 1e-6


@dataclass(frozen=True)
class _TensorFacts:
    """What a description of either version says about a tensor.

    Attributes:
        axes: letters of its axes in order, such as bcyx.
        channels: number of channels.
        names: their names; () if they say nothing.
        steps: processing, as the library has it.
        span: least and largest value; None where they are unknown.
        size: of an input: sides in px; None for an output.
        pixel_size_um: of an input: µm per px; None if unknown.
        margin: of an output: px of the input on each side of it that are cropped or to be cut; 0 if none is said.
        test: name and hash of the file with its test tensor; "" if there is none.
    """

    axes: str
    channels: int
    names: tuple[str, ...]
    steps: tuple[Any, ...]
    span: tuple[float | None, float | None]
    size: int | Size | None = None
    pixel_size_um: float | None = None
    margin: int = 0
    test: tuple[str, str | None] = ("", None)


@dataclass(frozen=True)
class Package:
    """A package that was read.

    Attributes:
        weights: the ONNX file.
        beside: name -> content of a file beside it that holds its weights.
        notes: what to know of how it was taken.
    """

    weights: bytes
    beside: dict[str, bytes]
    notes: tuple[str, ...]
    _files: PackageFiles
    _draft: CardDraft
    _input: _TensorFacts
    _outputs: tuple[_TensorFacts, ...]
    _endings: tuple[Steps, ...]
    _tests: tuple[NDArray[Any], ...]

    def draft(self, graph: GraphFile) -> CardDraft:
        """Return what the package says of the model whose graph was read from `weights`.

        Raises:
            ModelError: it says something else than the graph.
        """
        axis = self._input.axes.index("c")
        pairs = [(graph.input, self._input), *zip(graph.outputs, self._outputs, strict=False)]
        for port, facts in pairs:
            if port.shape[axis] not in (None, facts.channels):
                raise self._files.refused(
                    f"a graph with the {facts.channels} channels that the package says",
                    f"{port.shape[axis]} in {port.name}",
                    "correct the package",
                )
        if len(graph.outputs) != len(self._outputs):
            named = f"a graph with the {len(self._outputs)} outputs that the package says"
            raise self._files.refused(named, f"{len(graph.outputs)}", "correct the package")
        output = self._draft.output
        for port, facts, ending in zip(graph.outputs, self._outputs, self._endings, strict=True):
            applied = {"Sigmoid": "sigmoid", "Softmax": "softmax"}.get(graph.makers[port.name], "none")
            if "none" not in (applied, ending.activation):
                raise self._files.refused(
                    "one activation", f"{ending.activation} after the graph's own {applied}", _TAKE_OUT
                )
            if {applied, ending.activation} == {"none"} and facts.span == (0, 1) and ending.threshold is None:
                # Values that lie from 0 to 1 are probabilities, whatever operator ends the graph.
                output = replace(output, activation="sigmoid")
                applied = "sigmoid"
            if ending.threshold is not None:
                is_logit = {applied, ending.activation} == {"none"}
                at = 1 / (1 + math.exp(-ending.threshold)) if is_logit else ending.threshold
                if not 0 < at < 1:
                    raise self._files.refused(
                        "a threshold of probabilities, from 0 to 1", f"binarize at {at:g}", _TAKE_OUT
                    )
                output = replace(output, threshold=at)
        return replace(self._draft, output=output)

    def expected_output(self, graph: GraphFile) -> ExpectedOutput | None:
        """Return the test tensors; None if the package has none, or none that a bundle keeps."""
        if not self._tests:
            return None
        steps = [replace(ending, tensor=port.name) for ending, port in zip(self._endings, graph.outputs, strict=True)]
        return ExpectedOutput(self._tests[0], tuple(zip(steps, self._tests[1:], strict=True)))


def read_package(source: Path) -> Package:
    """Read a package, a folder or a zip archive.

    Raises:
        ModelError: it is damaged, has no ONNX weights, or says what a card cannot.
    """
    files = PackageFiles(source)
    description = _description(files)
    onnx = description.weights.onnx
    if onnx is None:
        others = ", ".join(description.weights.available_formats)
        raise files.refused("ONNX weights in the package", others, f"export the model to ONNX: {EXPORT}")
    if len(description.inputs) != 1:
        found = ", ".join(str(getattr(one, "id", None) or one.name) for one in description.inputs)
        raise files.refused("a model with one input", found, "export the network alone, on an image alone")
    notes: list[str] = []
    is_old = isinstance(description.inputs[0].axes, str)
    taken = (_input_of_0_4 if is_old else _input_of_0_5)(files, description, notes)
    given = tuple((_outputs_of_0_4 if is_old else _outputs_of_0_5)(files, description))
    for facts in (taken, *given):
        if facts.axes not in _LAYOUT_OF or facts.axes != taken.axes:
            raise files.refused(
                "2-D images in and out, with the axes batch, channel, y, x or batch, y, x, channel",
                ", ".join(facts.axes),
                "export the network of one 2-D image",
            )
    draft = CardDraft(
        input=InputDraft(
            channels=_roles(taken),
            normalisation=_normalisation(files, taken, notes),
            size=taken.size,
            pixel_size_um=taken.pixel_size_um,
            layout=_LAYOUT_OF[taken.axes],
        ),
        name=str(description.name),
        licence=str(description.license or ""),
        citation="; ".join(_citation(entry) for entry in description.cite),
        training=_origin(description),
    )
    endings = [_ending(files, facts, draft) for facts in given]
    output = OutputDraft(margin=max(facts.margin for facts in given) or None)
    if len(given) == 1 and "foreground" in given[0].names:
        exclusive = endings[0][0].activation == "softmax" and BACKGROUND not in given[0].names
        output = replace(output, channels=() if exclusive else given[0].names)
    stars = [rule for _, rule in endings if rule is not None]
    if stars:
        threshold, overlap = stars[0]
        draft = replace(draft, stardist=StarDist(overlap=overlap))
        output = replace(output, decoder="stardist", threshold=threshold)
    tests = () if stars else _tests(files, [taken, *given], notes)
    external = getattr(onnx, "external_data", None)
    attached = getattr(getattr(onnx, "attachments", None), "files", None) or ()
    names = [] if external is None else [(str(external.source), external.sha256)]
    beside = {
        PurePosixPath(name).name: files.read(name, LARGEST, sha256)
        for name, sha256 in [*names, *((str(name), None) for name in attached)]
    }
    weights = files.read(str(onnx.source), LARGEST, onnx.sha256)
    steps = tuple(ending for ending, _ in endings)
    return Package(weights, beside, tuple(notes), files, replace(draft, output=output), taken, given, steps, tests)


def _description(files: PackageFiles) -> Any:
    """The description as the library has it, valid by the specification."""
    try:
        from bioimageio.spec import InvalidDescr, ValidationContext, build_description
        from loguru import logger
        from ruyaml import YAML
    except ModuleNotFoundError as error:
        raise files.refused(
            "the package bioimageio.spec", str(error), "pip install 'cellseg-batch[bioimageio]'"
        ) from error
    name = files.description
    try:
        content = YAML(typ="safe").load(files.read(name, _LARGEST_DESCRIPTION).decode())
    except ModelError:
        raise
    except Exception as error:  # the library's own errors, too deep nesting
        raise files.refused(f"YAML in {name}", brief(error), "correct the package") from error
    if not isinstance(content, dict) or content.get("type") != "model":
        kind = content.get("type") if isinstance(content, dict) else type(content).__name__
        raise files.refused(f"type: model in {name}", str(kind)[:80], "name the package of a model")
    version = str(content.get("format_version"))
    if not re.match(r"0\.[45]\.", version):
        raise files.refused(
            "a description of version 0.4 or 0.5", f"format_version {version[:20]}", "update the package"
        )
    if _values_in(content) > _MOST_VALUES:
        raise files.refused(f"at most {_MOST_VALUES} values in {name}", "more", "correct the package")
    logger.disable("pydantic")  # by this name the library prints which axes it renames
    context = ValidationContext(perform_io_checks=False, log_warnings=False)
    try:
        description = build_description(content, context=context)
        reason = description.get_reason() if isinstance(description, InvalidDescr) else ""
    except Exception as error:  # what it does not foresee
        reason = brief(error)
    if reason:
        expected = f"a {name} that is valid by the specification {version}"
        raise files.refused(expected, (reason or "").splitlines()[0][:300], f"correct the package, or {_TAKE_OUT}")
    return description


def _values_in(content: object) -> int:
    """Number of values in a document, each alias counted as what it stands for; it is not counted beyond the most."""
    count, open_values = 0, [content]
    while open_values and count <= _MOST_VALUES:
        value = open_values.pop()
        count += 1
        if isinstance(value, dict):
            open_values += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            open_values += value
    return count


def _input_of_0_4(files: PackageFiles, description: Any, notes: list[str]) -> _TensorFacts:
    tensor = description.inputs[0]
    shape = tensor.shape
    parametrized = hasattr(shape, "min")
    lengths = dict(zip(tensor.axes, shape.min if parametrized else shape, strict=False))
    steps = dict(zip(tensor.axes, shape.step, strict=False)) if parametrized else {}
    sides = {axis: Size(lengths[axis], steps[axis]) if steps.get(axis) else lengths.get(axis) for axis in "yx"}
    return _TensorFacts(
        axes=tensor.axes,
        channels=lengths.get("c", 0),
        names=(),
        steps=tuple(tensor.preprocessing),
        span=tensor.data_range or (None, None),
        size=_one_size(files, sides),
        test=(str(description.test_inputs[0]), None) if description.test_inputs else ("", None),
    )


def _outputs_of_0_4(files: PackageFiles, description: Any) -> Iterable[_TensorFacts]:
    source = description.inputs[0]
    known = source.shape.min if hasattr(source.shape, "min") else source.shape
    of_input = dict(zip(source.axes, known, strict=False))
    tests = [*description.test_outputs, *[""] * len(description.outputs)]
    for tensor, test in zip(description.outputs, tests, strict=False):
        halo = dict(zip(tensor.axes, tensor.halo or [0] * len(tensor.axes), strict=False))
        if hasattr(tensor.shape, "scale"):
            scales = dict(zip(tensor.axes, tensor.shape.scale, strict=False))
            offsets = dict(zip(tensor.axes, tensor.shape.offset, strict=False))
            lengths = {axis: int((scales[axis] or 0) * of_input.get(axis, 0) + 2 * offsets[axis]) for axis in scales}
        else:
            lengths = dict(zip(tensor.axes, tensor.shape, strict=False))
            scales, offsets = dict.fromkeys(lengths, 1), dict.fromkeys(lengths, 0)
        cut = [(halo.get(axis, 0) - offsets.get(axis, 0)) / (scales.get(axis) or 1) for axis in "yx"]
        yield _TensorFacts(
            axes=tensor.axes,
            channels=lengths.get("c", 0),
            names=(),
            steps=tuple(tensor.postprocessing),
            span=tensor.data_range or (None, None),
            margin=math.ceil(max(cut)),
            test=(str(test), None),
        )


def _letters(tensor: Any) -> dict[str, Any]:
    """Letter of each axis of a tensor of 0.5, as 0.4 has it -> axis."""
    return {{"space": str(axis.id)}.get(axis.type, axis.type[0]): axis for axis in tensor.axes}


def _facts_of_0_5(tensor: Any, steps: Sequence[Any]) -> _TensorFacts:
    """What is said alike about inputs and outputs."""
    axes = _letters(tensor)
    names = tuple(str(name) for name in axes["c"].channel_names) if "c" in axes else ()
    data = tensor.data[0] if isinstance(tensor.data, Sequence) else tensor.data
    test = tensor.test_tensor
    return _TensorFacts(
        axes="".join(axes),
        channels=len(names),
        names=() if any(_NO_NAME.fullmatch(name) for name in names) else names,
        steps=tuple(steps),
        span=getattr(data, "range", (None, None)),
        test=("", None) if test is None else (str(test.source), test.sha256),
    )


def _input_of_0_5(files: PackageFiles, description: Any, notes: list[str]) -> _TensorFacts:
    tensor = description.inputs[0]
    axes = _letters(tensor)
    space = {axis: axes[axis] for axis in "yx" if axis in axes}
    sides: dict[str, int | Size | None] = {}
    for letter, axis in space.items():
        size = axis.size
        if hasattr(size, "axis_id"):  # as long as the other
            other = space.get(str(size.axis_id))
            if size.offset or other is None or other.scale != axis.scale:
                raise files.refused("square tiles", f"sides along {letter} that depend on others", _TAKE_OUT)
            size = other.size
        sides[letter] = Size(size.min, size.step) if hasattr(size, "min") else size
    pixel = settle_pixel_size({letter: (axis.scale, axis.unit) for letter, axis in space.items()})
    notes += pixel.notes
    sizes = set(pixel.um.values())
    if len(sizes) > 1:
        notes.append(f"pixels of {pixel.um['y']:g} x {pixel.um['x']:g} µm are not square; the pixel size is unknown")
    return replace(
        _facts_of_0_5(tensor, tensor.preprocessing),
        size=_one_size(files, sides),
        pixel_size_um=sizes.pop() if len(sizes) == 1 else None,
    )


def _outputs_of_0_5(files: PackageFiles, description: Any) -> Iterable[_TensorFacts]:
    source = _letters(description.inputs[0])
    for tensor in description.outputs:
        axes, cut = _letters(tensor), [0.0]
        for letter in "yx":
            axis = axes.get(letter)
            if axis is None or letter not in source:
                continue
            stride = axis.scale / source[letter].scale
            offset = getattr(axis.size, "offset", 0)
            cut.append((getattr(axis, "halo", 0) - offset / 2) * stride)
        yield replace(_facts_of_0_5(tensor, tensor.postprocessing), margin=math.ceil(max(cut)))


def _one_size(files: PackageFiles, sides: dict[str, int | Size | None]) -> int | Size | None:
    """The size along y, which is that along x; None if there are no such axes, which is refused with the axes."""
    height, width = sides.get("y"), sides.get("x")
    if height != width and None not in (height, width):
        raise files.refused("square tiles", f"{height} along y and {width} along x", "export the network of squares")
    return height


def _roles(tensor: _TensorFacts) -> tuple[str, ...]:
    """Roles of the input's channels; () where the package does not say them."""
    if tensor.channels == 1:
        return ("grey",)
    if tuple(name.lower() for name in tensor.names) in _RGB:
        return ("rgb",)
    return tensor.names


def _name_of(step: Any) -> str:
    return str(getattr(step, "id", None) or step.name)


def _reduced(step: Any) -> str:
    """Letters of the axes over which a step takes percentiles or means."""
    axes = getattr(step.kwargs, "axes", None)
    return "bcyx" if axes is None else "".join(str(axis)[0] for axis in axes)


def _normalisation(files: PackageFiles, tensor: _TensorFacts, notes: list[str]) -> NormalisationDraft:
    """The rule of all steps in front of the network together.

    Raises:
        ModelError: there is none in a card.
    """

    def refused(found: str) -> ModelError:
        return files.refused("preprocessing that a card can say", found, _TAKE_OUT)

    gain, offset = np.ones(1), np.zeros(1)
    statistic: NormalisationDraft | None = None
    clip: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    before = ""
    for number, step in enumerate(tensor.steps):
        name, kwargs = _name_of(step), step.kwargs
        if name == "ensure_dtype":
            # The first is the image's own type, the last the graph's, which was checked.
            if 0 < number < len(tensor.steps) - 1 and not kwargs.dtype.startswith("float"):
                raise refused(f"the step ensure_dtype to {kwargs.dtype} between others")
            continue
        is_fixed = name == "fixed_zero_mean_unit_variance" or getattr(kwargs, "mode", "") == "fixed"
        if is_fixed or name == "scale_linear":
            if statistic is not None:
                raise refused(f"the step {name} after {before}")
            if is_fixed:
                factor = 1 / _numbers(refused, tensor, step, "std")
                term = -_numbers(refused, tensor, step, "mean") * factor
            else:
                factor, term = _numbers(refused, tensor, step, "gain"), _numbers(refused, tensor, step, "offset")
            gain, offset = gain * factor, offset * factor + term
            clip = None if clip is None else (clip[0] * factor + term, clip[1] * factor + term)
        elif name in ("zero_mean_unit_variance", "scale_range"):
            if before:
                raise refused(f"the step {name} after {before}")
            statistic = _statistic(refused, step, notes)
        elif name == "clip":
            ends = kwargs.min, kwargs.max
            if clip is not None or None in ends:
                raise refused("the step clip twice, to one side, or to percentiles")
            clip = np.full(1, ends[0]), np.full(1, ends[1])
        else:
            raise refused(f"the step {name}")
        before = name
    unit = clip is not None and all(np.abs(end - value).max() < _NEAR for end, value in zip(clip, (0, 1), strict=True))
    if clip is not None and (not unit or (statistic is not None and statistic.kind == "zscore")):
        raise refused("the step clip to others than what becomes 0 and 1")
    if statistic is not None:
        return replace(statistic, clip=unit)
    if (gain <= 0).any():
        raise refused("the step scale_linear with a gain that is not above 0")
    low, high = (tuple(float(value) for value in (end - offset) / gain) for end in (0, 1))
    return NormalisationDraft("fixed" if unit else "linear", low, high, clip=unit)


def _numbers(refused: Any, tensor: _TensorFacts, step: Any, field: str) -> NDArray[np.float64]:
    """One number of a step for all channels, or one for each."""
    value = np.atleast_1d(np.asarray(getattr(step.kwargs, field), np.float64))
    along = str(getattr(step.kwargs, "axis", "channel"))
    if len(value) > 1 and (along != "channel" or "c" in str(getattr(step.kwargs, "axes", None) or "")):
        raise refused(f"the step {_name_of(step)} along {along}")
    if len(value) not in (1, tensor.channels):
        raise refused(f"the step {_name_of(step)} with {len(value)} numbers for {tensor.channels} channels")
    return value


def _statistic(refused: Any, step: Any, notes: list[str]) -> NormalisationDraft:
    """The rule of a step that asks the pixels themselves."""
    name, kwargs, reduced = _name_of(step), step.kwargs, _reduced(step)
    if not {"y", "x"} <= set(reduced):
        raise refused(f"the step {name} over {', '.join(reduced)}")
    if getattr(kwargs, "reference_tensor", None) is not None:
        raise refused(f"the step {name} by another tensor")
    whole = getattr(kwargs, "mode", "") == "per_dataset" or "batch" in (getattr(kwargs, "axes", None) or ())
    if whole:
        notes.append(f"{name} takes the values of a whole data set; each slide gets its own")
    joint = "c" in reduced
    if name == "zero_mean_unit_variance":
        return NormalisationDraft("zscore", joint=joint, clip=False, per_tile=not whole)
    low, high = float(kwargs.min_percentile), float(kwargs.max_percentile)
    return NormalisationDraft("percentile", low, high, joint, False, per_tile=not whole)


def _ending(files: PackageFiles, tensor: _TensorFacts, draft: CardDraft) -> tuple[Steps, tuple[float, float] | None]:
    """What is done behind the network; for stars, their threshold and overlap.

    Raises:
        ModelError: it is what a card cannot say.
    """

    def refused(found: str) -> ModelError:
        return files.refused("postprocessing that a card can say", found, _TAKE_OUT)

    steps, stars = Steps(""), None
    for step in tensor.steps:
        name = _name_of(step)
        if name == "custom":
            raise refused(f"the step custom, which runs code of the package ({step.callable})")
        if steps.threshold is not None and name != "ensure_dtype":
            raise refused(f"the step {name} after binarize")
        if name in ("sigmoid", "softmax") and steps.activation == "none":
            axis = str(getattr(step.kwargs, "axis", "channel")) if name == "softmax" else "channel"
            if axis != "channel":
                raise refused(f"the step softmax along {axis}")
            steps = replace(steps, activation=name)
        elif name == "binarize" and isinstance(step.kwargs.threshold, int | float):
            steps = replace(steps, threshold=float(step.kwargs.threshold))
        elif name == "stardist_postprocessing" and not hasattr(step.kwargs, "anisotropy"):
            stars = float(step.kwargs.prob_threshold), float(step.kwargs.nms_threshold)
        elif name != "ensure_dtype":
            raise refused(f"the step {name}")
    return steps, stars


def _tests(files: PackageFiles, tensors: Sequence[_TensorFacts], notes: list[str]) -> tuple[NDArray[Any], ...]:
    """The test tensors of the input and the outputs; () if not all are there and small."""
    if not all(facts.test[0] for facts in tensors):
        notes.append("the package has no test tensors")
        return ()
    arrays = []
    for facts in tensors:
        name, sha256 = facts.test
        if len(files.head(name, LARGEST_TEST + 1)) > LARGEST_TEST:
            notes.append(f"test tensors above {LARGEST_TEST >> 20} MiB are not kept: {name}")
            return ()
        try:
            array = np.lib.format.read_array(io.BytesIO(files.read(name, LARGEST_TEST, sha256)), allow_pickle=False)
        except ModelError:
            raise
        except Exception as error:  # numpy's own errors
            raise files.refused(
                f"{name} to be an array of numbers (npy)", brief(error), "correct the package"
            ) from error
        axis = facts.axes.index("c")
        if array.ndim != 4 or array.shape[axis] != facts.channels or array.dtype.kind not in "biuf" or not array.size:
            expected = f"{name} to have the axes {facts.axes} and {facts.channels} channels"
            raise files.refused(expected, f"{array.dtype} of shape {array.shape}", "correct the package")
        arrays.append(array)
    return tuple(arrays)


def _citation(entry: Any) -> str:
    where = f"https://doi.org/{entry.doi}" if entry.doi else str(entry.url or "")
    return f"{entry.text} ({where})" if where else str(entry.text)


def _origin(description: Any) -> dict[str, str]:
    """Where the model comes from."""
    documentation = getattr(description.documentation, "source", description.documentation)
    data = description.training_data
    return {
        name: value
        for name, value in (
            ("package", " ".join(str(part) for part in (description.id, description.version) if part)),
            ("authors", ", ".join(str(author.name) for author in description.authors)),
            ("documentation", str(documentation or "")),
            ("data", "" if data is None else str(getattr(data, "id", None) or getattr(data, "name", ""))),
        )
        if value
    }
