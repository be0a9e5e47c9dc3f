"""What the description of a bioimage.io package says (RDF 0.4 and 0.5), the same facts of both versions.

The library ``bioimageio.spec`` validates it, without looking at files or addresses.  Each version is read as it is: the
library's own conversion from 0.4 loses hashes, and refuses outputs of one size with a halo.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cellseg_batch.engine.errors import brief
from cellseg_batch.engine.reports.package_files import PackageFiles
from cellseg_batch.engine.slides.pixel_size import settle_pixel_size
from cellseg_batch.trainer.card import Size

_LARGEST, _MOST_VALUES = 1 << 20, 100_000
# Channel names by which writers of packages say nothing.
_NO_NAME = re.compile(r"(channel|ch|c)?[ _-]?\d*", re.IGNORECASE)
TAKE_OUT = "take the .onnx file out of the package, and say the rest in a card.toml"


@dataclass(frozen=True)
class NamedFile:
    """A file that a description names.

    Attributes:
        name: its path in the package.
        sha256: its hash; None if the description does not say it.
    """

    name: str
    sha256: str | None = None


@dataclass(frozen=True)
class TensorFacts:
    """What a description says about a tensor.

    Attributes:
        axes: letters of its axes in order, such as bcyx.
        channels: number of channels.
        names: their names; () if they say nothing.
        steps: processing steps, as the library has them.
        span: least and largest value; None where they are unknown.
        test: its test tensor; None if there is none.
        size: of an input: sides in px.
        pixel_size_um: of an input: µm per px; None if unknown.
        margin: of an output: px of the input on each side for which it has nothing, or nothing to be used.
    """

    axes: str
    channels: int
    names: tuple[str, ...]
    steps: tuple[Any, ...]
    span: tuple[float | None, float | None]
    test: NamedFile | None
    size: int | Size | None = None
    pixel_size_um: float | None = None
    margin: int = 0


@dataclass(frozen=True)
class Description:
    """What a description says about a model.

    Attributes:
        name: its name.
        licence: its licence; "" if unknown.
        citation: what to cite.
        origin: where it comes from: package, authors, documentation, data.
        formats: formats of its weights.
        weights: the ONNX file; None if there is none.
        beside: files with weights that lie beside it.
        input: the input.
        outputs: the outputs, in the graph's order.
        notes: what to know of how the description was taken.
    """

    name: str
    licence: str
    citation: str
    origin: dict[str, str]
    formats: tuple[str, ...]
    weights: NamedFile | None
    beside: tuple[NamedFile, ...]
    input: TensorFacts
    outputs: tuple[TensorFacts, ...]
    notes: tuple[str, ...]


def read_description(files: PackageFiles) -> Description:
    """Read and validate the description of a package.

    Raises:
        ModelError: it is not valid, of another version or of no model, or its tiles are no squares.
    """
    valid = _valid(files)
    if len(valid.inputs) != 1:
        found = ", ".join(str(getattr(one, "id", None) or one.name) for one in valid.inputs)
        raise files.refused("a model with one input", found, "export the network alone, on an image alone")
    notes: list[str] = []
    old = isinstance(valid.inputs[0].axes, str)
    try:
        taken = _input_of_0_4(valid) if old else _input_of_0_5(valid, notes)
        given = _outputs_of_0_4(valid) if old else _outputs_of_0_5(valid)
    except ValueError as error:
        expected = "a length for each axis, the same along y and x"
        raise files.refused(expected, str(error), "export the network of squares") from error
    onnx = valid.weights.onnx
    external = getattr(onnx, "external_data", None)
    attached = getattr(getattr(onnx, "attachments", None), "files", None) or ()
    return Description(
        name=str(valid.name),
        licence=str(valid.license or ""),
        citation="; ".join(_citation(entry) for entry in valid.cite),
        origin=_origin(valid),
        formats=tuple(valid.weights.available_formats),
        weights=None if onnx is None else _file(onnx),
        beside=(*([] if external is None else [_file(external)]), *(NamedFile(str(name)) for name in attached)),
        input=taken,
        outputs=tuple(given),
        notes=tuple(notes),
    )


def _valid(files: PackageFiles) -> Any:
    """The description as the library has it."""
    try:
        from bioimageio.spec import InvalidDescr, ValidationContext, build_description
        from loguru import logger
        from ruyaml import YAML
    except ModuleNotFoundError as error:
        remedy = "pip install 'cellseg-batch[bioimageio]'"
        raise files.refused("the package bioimageio.spec", str(error), remedy) from error
    name = files.description
    text = files.read(name, _LARGEST)
    try:
        content = YAML(typ="safe").load(text.decode())
    except Exception as error:  # the library's own errors, or too deep nesting
        raise files.refused(f"YAML in {name}", brief(error), "correct the package") from error
    if not isinstance(content, dict) or content.get("type") != "model":
        kind = content.get("type") if isinstance(content, dict) else type(content).__name__
        raise files.refused(f"type: model in {name}", str(kind)[:80], "name the package of a model")
    version = str(content.get("format_version"))[:20]
    if not re.match(r"0\.[45]\.", version):
        raise files.refused("a description of version 0.4 or 0.5", f"format_version {version}", "update the package")
    if _values_in(content) > _MOST_VALUES:
        raise files.refused(f"at most {_MOST_VALUES} values in {name}", "more", "correct the package")
    logger.disable("pydantic")  # under this name the library prints which axes it renames
    context = ValidationContext(perform_io_checks=False, log_warnings=False)
    try:
        valid = build_description(content, context=context)
        reason = valid.get_reason() or "no reason" if isinstance(valid, InvalidDescr) else ""
    except Exception as error:  # what the library does not foresee
        reason = brief(error)
    if reason:
        expected = f"a {name} that is valid by the specification {version}"
        raise files.refused(expected, reason.splitlines()[0][:300], f"correct the package, or {TAKE_OUT}")
    return valid


def _values_in(content: object) -> int:
    """Number of values in a document, each alias counted as what it stands for; not counted beyond the most."""
    count, left = 0, [content]
    while left and count <= _MOST_VALUES:
        value = left.pop()
        count += 1
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            left += value
    return count


def _file(entry: Any) -> NamedFile:
    return NamedFile(str(entry.source), entry.sha256)


def _input_of_0_4(valid: Any) -> TensorFacts:
    """Facts of the input; raises ValueError if it is not square."""
    (tensor,), tests = valid.inputs, valid.test_inputs
    least = _by_axis(tensor, getattr(tensor.shape, "min", tensor.shape))
    steps = _by_axis(tensor, getattr(tensor.shape, "step", [0] * len(tensor.axes)))
    sides = {axis: Size(least[axis], steps[axis]) if steps[axis] else least[axis] for axis in "yx" if axis in least}
    facts = _facts_of_0_4(tensor, tensor.preprocessing, least.get("c", 0), tests[0] if tests else None)
    return replace(facts, size=_one_of(sides))


def _outputs_of_0_4(valid: Any) -> list[TensorFacts]:
    (source,) = valid.inputs
    of_input = _by_axis(source, getattr(source.shape, "min", source.shape))
    tests = [*valid.test_outputs, *[None] * len(valid.outputs)]
    facts = []
    for tensor, test in zip(valid.outputs, tests, strict=False):
        halo = _by_axis(tensor, tensor.halo or [0] * len(tensor.axes))
        if hasattr(tensor.shape, "scale"):
            lengths = of_input
            scales = {axis: scale or 0 for axis, scale in _by_axis(tensor, tensor.shape.scale).items()}
            offsets = _by_axis(tensor, tensor.shape.offset)
        else:
            lengths, scales, offsets = _by_axis(tensor, tensor.shape), {}, {}
        channels = int(scales.get("c", 1) * lengths.get("c", 0) + 2 * offsets.get("c", 0))
        # Of the output, a px of the input is ``scale`` px.
        cut = [(halo.get(axis, 0) - offsets.get(axis, 0)) / (scales.get(axis) or 1) for axis in "yx"]
        found = _facts_of_0_4(tensor, tensor.postprocessing, channels, test)
        facts.append(replace(found, margin=_whole(cut)))
    return facts


def _by_axis(tensor: Any, values: Sequence[Any]) -> dict[str, Any]:
    """Letter of each axis of a tensor of 0.4 -> value; raises ValueError if there are not as many."""
    if len(values) != len(tensor.axes):
        raise ValueError(f"{len(values)} lengths for the axes {tensor.axes}")
    return dict(zip(tensor.axes, values, strict=True))


def _facts_of_0_4(tensor: Any, steps: Sequence[Any], channels: int, test: Any) -> TensorFacts:
    return TensorFacts(
        axes=str(tensor.axes),
        channels=channels,
        names=(),
        steps=tuple(steps),
        span=tensor.data_range or (None, None),
        test=None if test is None else NamedFile(str(test)),
    )


def _input_of_0_5(valid: Any, notes: list[str]) -> TensorFacts:
    """Facts of the input; raises ValueError if it is not square."""
    (tensor,) = valid.inputs
    axes = _by_letter(tensor)
    space = {letter: axes[letter] for letter in "yx" if letter in axes}
    sides: dict[str, int | Size] = {}
    for letter, axis in space.items():
        size = axis.size
        if hasattr(size, "axis_id"):  # it depends on the other axis
            other = space.get(str(size.axis_id))
            if size.offset or other is None or other.scale != axis.scale:
                raise ValueError(f"another length along {letter}")
            size = other.size
        sides[letter] = Size(size.min, size.step) if hasattr(size, "min") else int(size)
    pixel = settle_pixel_size({letter: (axis.scale, axis.unit) for letter, axis in space.items()})
    notes += pixel.notes
    um = set(pixel.um.values())
    if len(um) > 1:
        notes.append("the model's pixels are not square, so that their size is taken for unknown")
    facts = _facts_of_0_5(tensor, tensor.preprocessing)
    return replace(facts, size=_one_of(sides), pixel_size_um=um.pop() if len(um) == 1 else None)


def _outputs_of_0_5(valid: Any) -> list[TensorFacts]:
    source = _by_letter(valid.inputs[0])
    facts = []
    for tensor in valid.outputs:
        cut = [0.0]
        for letter, axis in _by_letter(tensor).items():
            if letter in "yx" and letter in source:
                stride = axis.scale / source[letter].scale
                cut.append((getattr(axis, "halo", 0) - getattr(axis.size, "offset", 0) / 2) * stride)
        facts.append(replace(_facts_of_0_5(tensor, tensor.postprocessing), margin=_whole(cut)))
    return facts


def _facts_of_0_5(tensor: Any, steps: Sequence[Any]) -> TensorFacts:
    axes = _by_letter(tensor)
    names = tuple(str(name) for name in axes["c"].channel_names) if "c" in axes else ()
    data = tensor.data[0] if isinstance(tensor.data, Sequence) else tensor.data
    return TensorFacts(
        axes="".join(axes),
        channels=len(names),
        names=() if any(_NO_NAME.fullmatch(name) for name in names) else names,
        steps=tuple(steps),
        span=getattr(data, "range", (None, None)),
        test=None if tensor.test_tensor is None else _file(tensor.test_tensor),
    )


def _by_letter(tensor: Any) -> dict[str, Any]:
    """Axes of a tensor of 0.5 by the letters of 0.4, in order."""
    return {str(axis.id) if axis.type == "space" else axis.type[0]: axis for axis in tensor.axes}


def _whole(margins: Sequence[float]) -> int:
    """The largest of margins in px, rounded up.

    Raises:
        ValueError: one is no number.
    """
    if not all(math.isfinite(margin) for margin in margins):
        raise ValueError("an output whose scale no image has")
    return math.ceil(max(margins))


def _one_of(sides: dict[str, int | Size]) -> int | Size | None:
    """The size of a square.

    Raises:
        ValueError: it is none.
    """
    if len(set(sides.values())) > 1:
        raise ValueError(f"{sides['y']} px along y, {sides['x']} along x")
    return next(iter(sides.values()), None)


def _citation(entry: Any) -> str:
    where = f"https://doi.org/{entry.doi}" if entry.doi else str(entry.url or "")
    return f"{entry.text} ({where})" if where else str(entry.text)


def _origin(valid: Any) -> dict[str, str]:
    documentation = getattr(valid.documentation, "source", valid.documentation)
    data = valid.training_data
    origin = {
        "package": " ".join(str(part) for part in (valid.id, valid.version) if part),
        "authors": ", ".join(str(author.name) for author in valid.authors),
        "documentation": str(documentation or ""),
        "data": str(getattr(data, "id", None) or getattr(data, "name", None) or ""),
    }
    return {name: value for name, value in origin.items() if value}
