"""Make a bundle of a model that somebody else trained: its graph, and a card that was checked against the graph.

What a graph shows is read from it; the rest is said by a ``card.toml`` or by the package that the graph came in, and
what is missing is asked for by name.
"""

from __future__ import annotations

import math
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cellseg_batch.engine.errors import CellsegError, ModelError, UsageError, brief, writing_to
from cellseg_batch.engine.inference.backends.onnxruntime_cpu import run_graph
from cellseg_batch.engine.inference.backends.registry import REFERENCES, make_backend
from cellseg_batch.engine.inference.onnx_file import GraphFile, Port, read_graph
from cellseg_batch.engine.inference.onnx_footprint import measure_footprint, measure_output_stride
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.reports.bioimageio_package import Package, read_package
from cellseg_batch.engine.reports.card_draft import (
    EXAMPLES,
    CardDraft,
    InputDraft,
    Numbers,
    OutputDraft,
    TensorDraft,
    read_draft,
)
from cellseg_batch.engine.reports.expected_output import ExpectedOutput
from cellseg_batch.engine.reports.output_values import check_values
from cellseg_batch.engine.reports.package_files import is_package
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle, save_bundle
from cellseg_batch.trainer.card import (
    CARD_PROPERTY,
    DECODER_OUTPUTS,
    LAYOUTS,
    ONNX,
    RAY,
    RAYS,
    Card,
    Hover,
    Input,
    Instances,
    ModelClass,
    Normalisation,
    Output,
    Size,
    StarDist,
    Tensor,
    class_colours,
    count_channels,
)
from cellseg_batch.trainer.receptive_field import Footprint

# A model whose card says no margin gets this one, in px, or its exact margin where that is smaller.
_MARGIN = 64
# Probability above which a pixel is foreground, if nothing else is said.
_THRESHOLD = 0.5
# Table of a card -> decoders that take its numbers.
_DECODERS_OF = {"instances": ("mask", "seeds", "classes"), "hover": ("hover",), "stardist": ("stardist",)}
# Sides in px that are tried on a graph that takes several.
_SIDES = (256, 512, 1024)
_LARGEST_SIDE = 4096
# That of a graph of which nothing is known yet.
_ANY_SIZE = Size(1, 1)


@dataclass(frozen=True)
class ImportedModel:
    """What was made of a model.

    Attributes:
        card: the card of its bundle.
        notes: what to know of how a package was taken.
    """

    card: Card
    notes: tuple[str, ...] = ()


def import_model(source: Path, out: Path, card: Path | None = None, name: str | None = None) -> ImportedModel:
    """Write the bundle of a model to the folder ``out``.

    Args:
        source: an ONNX file, or a bioimage.io package with ONNX weights, a folder or a zip archive.
        out: folder of the bundle, which must not exist.
        card: the ``card.toml``, which counts before what a package says; None if the source says everything itself, as
            files do that ``export`` wrote.
        name: name of the model; None takes the card's or package's, else that of ``out``.

    Raises:
        ModelError: the source or the card is refused, or the card lacks what the graph does not show.
        UsageError: there is something at ``out``.
        OutputError: the bundle cannot be written.
    """
    if out.exists():
        raise UsageError(f"`out={out}`", expected="a folder that is not there yet", found="one", remedy="name another")
    said = replace(read_draft(card), name=name) if name else read_draft(card)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        package = read_package(source) if is_package(source) else None
        graph = read_graph(source) if package is None else _graph_in(package, source, Path(folder) / "package")
        path.write_bytes(graph.serialised)
        if package is None and card is None and CARD_PROPERTY in graph.properties:
            bundle = _with_own_card(source, path, graph, name)
        else:
            draft = said if package is None else said.completed_by(package.draft(graph))
            bundle = _bundle_of(source, path, graph, replace(draft, name=draft.name or out.name))
        expected = None if package is None else _checked(source, package.expected_output(graph), bundle)
        with writing_to(out, "a bundle"):
            save_bundle(bundle, out)
            if expected is not None:
                expected.save(out)
    return ImportedModel(bundle.card, () if package is None else package.notes)


def _graph_in(package: Package, source: Path, folder: Path) -> GraphFile:
    """The graph of a package, whose weights are written to ``folder``."""
    folder.mkdir()
    for name, content in package.weights.items():
        (folder / name).write_bytes(content)
    try:
        return read_graph(folder / package.graph)
    except ModelError as error:
        raise ModelError.with_detail(str(source), error.detail) from error


def _checked(source: Path, expected: ExpectedOutput | None, bundle: Bundle) -> ExpectedOutput | None:
    """The expected output, after the graph has run on its input."""
    try:
        if expected is not None:
            expected.compare(bundle, cores())
    except ValueError as error:
        raise ModelError(
            str(source),
            expected="test tensors of the graph's shapes",
            found=str(error),
            remedy="correct the package",
        ) from error
    return expected


def _bundle_of(source: Path, path: Path, graph: GraphFile, draft: CardDraft) -> Bundle:
    """The bundle of the graph at ``path``, measured with what the draft says."""
    if not draft.input.channels:
        raise _missing(source, "input.channels", f"an input of shape {_words(graph.input)}")
    if draft.input.normalisation is None:
        raise _missing(source, "input.normalisation", "none in the file")
    if not draft.output.decoder:
        raise _missing(source, "output.decoder", f"outputs {', '.join(_words(port) for port in graph.outputs)}")
    if draft.output.decoder == "classes" and not draft.output.classes:
        raise _missing(source, "output.classes", "none")
    try:
        _refuse_unheeded(draft)
        if draft.output.decoder not in DECODER_OUTPUTS:
            raise ValueError(f"decoder: expected one of {', '.join(DECODER_OUTPUTS)}, found {draft.output.decoder!r}")
        taken = _input_of(source, graph.input, draft.input)
        output = Output(_tensors_of(source, graph, draft.output, taken.layout))
        card = Card(
            name=draft.name,
            input=taken,
            output=output,
            decoder=draft.output.decoder,
            total_stride=1,
            exact_margin=None,
            margin=0,
            threshold=_THRESHOLD if draft.output.threshold is None else draft.output.threshold,
            instances=draft.instances or Instances(),
            hover=draft.hover or Hover(),
            stardist=draft.stardist or StarDist(),
            classes=_coloured(draft.output.classes),
            licence=draft.licence,
            citation=draft.citation,
            training=dict(draft.training),
            format=ONNX,
        )
        card.check()
        card = _measured(source, path, card, draft)
        card.check()
    except ValueError as error:
        raise ModelError(
            str(source),
            expected="a card that agrees with itself and with the graph",
            found=str(error),
            remedy="correct the card.toml (--card), which counts before what a package says, or export the model again",
        ) from error
    return Bundle(card, graph=path)


def _refuse_unheeded(draft: CardDraft) -> None:
    """Refuse what is said and would change nothing; raises ValueError."""
    output, rule = draft.output, draft.input.normalisation
    if output.tensors and (output.channels or output.activation):
        raise ValueError("output: channels and activation are those of each tensor where tensors are named")
    if rule is not None and rule.kind == "zscore" and (rule.low is not None or rule.high is not None):
        raise ValueError(
            "normalisation: zscore takes the slide's own mean and deviation; for known ones say "
            'kind = "linear", low = the mean, high = the mean + the deviation'
        )
    for table, decoders in _DECODERS_OF.items():
        if getattr(draft, table) is not None and output.decoder not in decoders:
            raise ValueError(f"{table}: its numbers are those of {', '.join(decoders)}, not of {output.decoder}")


def _coloured(names: tuple[str, ...]) -> tuple[ModelClass, ...]:
    """Classes in colours of their own."""
    return tuple(ModelClass(*pair) for pair in zip(names, class_colours(len(names)), strict=True))


def _with_own_card(source: Path, path: Path, graph: GraphFile, name: str | None) -> Bundle:
    """The bundle of a graph that ``export`` wrote, with the card inside it."""
    try:
        card = Card.from_json(graph.properties[CARD_PROPERTY])
        card = replace(card, name=name or card.name)
        side = card.input.size.min
        if not 1 <= side <= _LARGEST_SIDE:
            raise ValueError(f"it names tiles of at least {side} px; from 1 to {_LARGEST_SIDE} px can be taken")
        given = [tensor.name for tensor in card.output.tensors]
        if card.format != ONNX or set(given) - {port.name for port in graph.outputs}:
            raise ValueError(f"it names {', '.join(given)}, the graph gives {_words(graph.outputs[0])}")
        if graph.input.shape[1] not in (None, card.input.count):
            raise ValueError(f"it names {card.input.count} channels, the graph takes {_words(graph.input)}")
        if _sides_of(path, card, side) != (side, side):
            raise ValueError(f"the graph gives another size for {side} px")
    except ValueError as error:
        raise ModelError(
            str(source),
            expected="a card in the file that agrees with its graph",
            found=str(error),
            remedy="export the model again, or give a card.toml",
        ) from error
    return Bundle(card, graph=path)


def _missing(source: Path, name: str, found: str) -> ModelError:
    table, _, key = name.partition(".")
    return ModelError(
        str(source),
        expected=f"{key} in the table [{table}] of a card.toml",
        found=found,
        remedy=f"add to [{table}] of --card: {EXAMPLES[name]}",
    )


def _words(port: Port) -> str:
    return f"{port.name} ({', '.join('?' if side is None else str(side) for side in port.shape)})"


def _input_of(source: Path, port: Port, draft: InputDraft) -> Input:
    """What the graph takes; its size is settled later if the graph leaves it open.

    Raises:
        ValueError: the draft's parts do not go together.
    """
    assert draft.normalisation is not None
    given = draft.normalisation
    if given.kind in ("fixed", "linear") and (given.low is None or given.high is None):
        raise ValueError(f"normalisation {given.kind} needs low and high, the pixel values that become 0 and 1")
    plain = Normalisation()
    normalisation = Normalisation(
        given.kind,
        plain.low if given.low is None else _tuple(given.low),
        plain.high if given.high is None else _tuple(given.high),
        given.joint,
        given.kind in ("percentile", "fixed") if given.clip is None else given.clip,
        given.per_tile,
    )
    layout = draft.layout or _layout_of(source, port, count_channels(draft.channels))
    taken = Input(draft.channels, normalisation, _ANY_SIZE, draft.pixel_size_um, layout)
    batch, channels, height, width = (port.shape[layout.index(axis)] for axis in "NCHW")
    if channels not in (None, taken.count):
        raise ValueError(
            f"channels: the graph takes {_words(port)} in the layout {layout}, the card names {taken.count} "
            f"({', '.join(draft.channels)})"
        )
    if height != width:
        raise ValueError(f"size: the graph takes {_words(port)}; tiles are squares of one or of any size")
    if batch not in (None, 1):
        raise ValueError(f"batch: the graph takes {batch} images at once; export it for 1 or for any number")
    size = Size(draft.size, 0) if isinstance(draft.size, int) else draft.size
    if height is not None:
        if size is not None and size.fixed != height:
            raise ValueError(f"size: the graph takes {height} px alone, the card says {draft.size}")
        size = Size(height, 0)
    return replace(taken, size=size or taken.size, batch=batch)


def _tuple(numbers: Numbers) -> tuple[float, ...]:
    return numbers if isinstance(numbers, tuple) else (float(numbers),)


def _layout_of(source: Path, port: Port, count: int) -> str:
    fitting = [layout for layout in LAYOUTS if port.shape[layout.index("C")] == count]
    if fitting:
        return fitting[0]
    if port.shape[1] is None and port.shape[3] is None:
        raise _missing(source, "input.layout", f"an input of shape {_words(port)}")
    raise ValueError(f"channels: the graph takes {_words(port)}, the card names {count}")


def _tensors_of(source: Path, graph: GraphFile, draft: OutputDraft, layout: str) -> tuple[Tensor, ...]:
    """The tensors that are taken of the graph, each with the activation that the graph has applied.

    Raises:
        ValueError: the graph does not give what the draft says.
    """
    ports, axis = {port.name: port for port in graph.outputs}, layout.index("C")
    if draft.tensors:
        drafts = draft.tensors
    elif len(ports) == 1:
        (port,) = ports.values()
        usual = (*DECODER_OUTPUTS[draft.decoder], *draft.classes)
        without_background = draft.classes and port.shape[axis] == len(draft.classes)
        channels = draft.channels or (draft.classes if without_background else usual)
        drafts = (TensorDraft(port.name, channels, draft.activation),)
    else:
        raise ValueError(
            f"output: the graph gives {', '.join(ports)}; say which to take: "
            'tensors = [{name = "...", channels = ["..."]}]'
        )
    tensors = []
    for tensor in drafts:
        if tensor.name not in ports:
            raise ValueError(f"output.tensors: the graph gives {', '.join(ports)}, not {tensor.name}")
        found = ports[tensor.name].shape[axis]
        channels = _with_rays(tensor.channels, found)
        if found is not None and found != len(channels):
            named = ", ".join(tensor.channels) or "none"
            raise _missing(source, "output.channels", f"{found} channels in {tensor.name}, and the names {named}")
        made = graph.activation_of(tensor.name)
        if tensor.activation == "none" != made:
            raise ValueError(f"output.activation: the card says none, {tensor.name} is what a {made} gives")
        tensors.append(Tensor(channels, tensor.name, tensor.activation or made))
    return tuple(tensors)


def _with_rays(channels: tuple[str, ...], count: int | None) -> tuple[str, ...]:
    """The meaning of each channel of ``count``, where ``rays`` stands for all rays.

    Raises:
        ValueError: there are such, and the graph does not say how many.
    """
    if RAYS not in channels:
        return channels
    if count is None:
        raise ValueError(f"output: the graph does not say how many rays it gives; name them {RAY}1, {RAY}2 and so on")
    at = channels.index(RAYS)
    rays = tuple(f"{RAY}{number + 1}" for number in range(count - len(channels) + 1))
    return (*channels[:at], *rays, *channels[at + 1 :])


def _measured(source: Path, path: Path, card: Card, draft: CardDraft) -> Card:
    """The card with the sizes, crop, strides and margins that the graph shows when it runs.

    Raises:
        ValueError: the graph runs at no size, or gives another one than its card says.
    """
    size = card.input.size
    if size.min > _LARGEST_SIDE:
        raise ValueError(f"size: tiles of at least {size.min} px; at most {_LARGEST_SIDE} px can be taken")
    side, given = _first_run(path, card)
    stride = measure_output_stride(Bundle(card, graph=path), side, given, cores())
    if stride is None:
        raise ValueError(f"output: {given} px for a tile of {side} px; as much must be cut from each side")
    crop = (side - stride * given) // 2
    card = replace(card, output=replace(card.output, crop=crop, stride=stride))
    if crop and card.grid > 1:
        raise ValueError(
            f"output: rays for each {stride} px, {crop} px from the tile's edges; one of both can be taken"
        )
    for name in check_values(Bundle(card, graph=path), side, cores()):
        if draft.output.activation is None and name not in [one.name for one in draft.output.tensors if one.activation]:
            raise _missing(source, "output.activation", f"values from 0 to 1 alone in {name}")
    if size.fixed:
        total = stride if size.fixed % stride == 0 else 1
        footprint, least = Footprint(total, None, "it takes tiles of a single size"), size
    else:
        footprint = measure_footprint(Bundle(card, graph=path), cores())
        # A person's step counts where none can be seen.
        seen = 1 if footprint.exact_margin is None and size.step > 1 else footprint.total_stride
        step = math.lcm(seen, size.step)
        if draft.input.size is not None and size.min % step:
            raise ValueError(f"size: tiles are whole strides of {step} px, which {size.min} px is not")
        exact = None if footprint.exact_margin is None else -(-footprint.exact_margin // step) * step
        footprint = replace(footprint, total_stride=step, exact_margin=exact)
        least = Size(_least_side(path, card, step) if draft.input.size is None else size.min, step)
        for one in (least.min, least.min + step):
            if not _runs_at(path, card, one):
                raise ValueError(f"size: the graph does not run on tiles of {one} px; say {EXAMPLES['input.size']}")
    margin = _margin_of(footprint, crop, draft.output.margin, least)
    if least.fixed and 2 * margin >= least.fixed:
        raise ValueError(f"margin: {margin} px cut from each side of tiles of {least.fixed} px leave nothing")
    return replace(
        card,
        input=replace(card.input, size=least),
        total_stride=footprint.total_stride,
        exact_margin=footprint.exact_margin,
        margin=margin,
    )


def _margin_of(footprint: Footprint, crop: int, said: int | None, size: Size) -> int:
    """The default margin in px, in whole strides: the card's; else the exact one, up to 64 px or a quarter tile.

    Raises:
        ValueError: the card's is below 0.
    """
    if said is None:
        limits = (_MARGIN, footprint.exact_margin, size.fixed and size.fixed // 4)
        said = min(limit for limit in limits if limit is not None)
    elif said < 0:
        raise ValueError(f"margin: expected 0 px or more, found {said}")
    return -(-max(said, crop) // footprint.total_stride) * footprint.total_stride


def _first_run(path: Path, card: Card) -> tuple[int, int]:
    """Side in px of a tile that the graph runs at, and that of what it gives.

    Raises:
        ValueError: it runs at none that is tried, or gives what is no square or larger than its tile.
    """
    size = card.input.size
    wanted = [side for side in _SIDES if size.step and side >= size.min]
    trials = [size.min + -(-(side - size.min) // size.step) * size.step for side in wanted] or [size.min]
    failures = []
    for side in trials:
        try:
            given = _sides_in_file(path, card, side)
            break
        except Exception as error:  # the library's own errors
            failures.append(brief(error))
    else:
        raise ValueError(f"size: the graph runs at none of {trials} px ({failures[0]}); say {EXAMPLES['input.size']}")
    if len(set(given.values())) > 1:
        found = ", ".join(f"{name} of {height} x {width}" for name, (height, width) in given.items())
        raise ValueError(f"output: {found} values for a tile of {side} px; tensors of one size can be taken")
    height, width = next(iter(given.values()))
    if height != width:
        layout = card.input.layout
        raise ValueError(f"output: {height} x {width} values for a tile of {side} px, if its layout is {layout} too")
    if height > side:
        raise ValueError(f"output: {height} px for a tile of {side} px; there is at most one value for each px")
    return side, height


def _least_side(path: Path, card: Card, stride: int) -> int:
    """The smallest side in px, ``stride`` times a power of two, at which the network runs."""
    side = stride
    while side <= _SIDES[-1]:
        if _runs_at(path, card, side):
            return side
        side *= 2
    raise ValueError(f"size: the graph runs at no whole strides of {stride} px; say {EXAMPLES['input.size']}")


def _runs_at(path: Path, card: Card, side: int) -> bool:
    """Whether the graph gives for a tile of ``side`` px what its card says."""
    with suppress(ValueError):
        return _sides_of(path, card, side) == (side // card.grid, side // card.grid)
    return False


def _sides_in_file(path: Path, card: Card, side: int) -> dict[str, tuple[int, int]]:
    """Name of each tensor of the card -> height and width of what the graph, as it is, gives for ``side`` px."""
    nothing = np.zeros((1, card.input.count, side, side), np.float32)
    given = run_graph(path.read_bytes(), nothing, cores(), card.input.layout)
    shapes = {tensor.name: given[tensor.name].shape for tensor in card.output.tensors}
    return {name: (height, width) for name, (_, _, height, width) in shapes.items()}


def _sides_of(path: Path, card: Card, side: int) -> tuple[int, int]:
    """Height and width of what the graph gives for a tile of ``side`` px, in the library that is the reference.

    Raises:
        ValueError: it does not run on such a tile.
    """
    shape = (1, card.input.count, side, side)
    try:
        backend = make_backend(Bundle(card, graph=path), *REFERENCES[ONNX], cores(), Artefacts())
        logits = backend.compile(shape)(np.zeros(shape, np.float32))
    except CellsegError:
        raise
    except Exception as error:  # the library's own errors
        raise ValueError(brief(error)) from error
    return logits.shape[2], logits.shape[3]
