"""Read a bioimage.io package: its ONNX weights, its test tensors, and what it says as the draft of a card."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from scipy.special import expit

from cellseg_batch.engine.errors import brief
from cellseg_batch.engine.inference.onnx_file import LARGEST, GraphFile, Port
from cellseg_batch.engine.reports.bioimageio_description import (
    TAKE_OUT,
    Description,
    NamedFile,
    TensorFacts,
    read_description,
)
from cellseg_batch.engine.reports.bioimageio_steps import Stars, ending_of, normalisation_of
from cellseg_batch.engine.reports.card_draft import CardDraft, InputDraft, OutputDraft
from cellseg_batch.engine.reports.expected_output import Ending, ExpectedOutput
from cellseg_batch.engine.reports.package_files import PackageFiles
from cellseg_batch.trainer.card import BACKGROUND, LAYOUTS, StarDist

_LAYOUT_OF = dict(zip(("bcyx", "byxc"), LAYOUTS, strict=True))
# Bytes of a test tensor that a bundle keeps.
LARGEST_TEST = 32 << 20
_RGB = (("r", "g", "b"), ("red", "green", "blue"))


@dataclass(frozen=True)
class Package:
    """A package that was read.

    Attributes:
        files: its files.
        description: what it says.
        graph: name of the ONNX file.
        weights: name -> content of the ONNX file and of the files beside it that hold its weights.
        said: draft of what it says, whatever the graph shows.
        endings: what is done behind each output; () if they become stars.
        tests: test tensors of the input and of each output; () if there are none that a bundle keeps.
        notes: what to know of how it was taken.
    """

    files: PackageFiles
    description: Description
    graph: str
    weights: dict[str, bytes]
    said: CardDraft
    endings: tuple[Ending, ...]
    tests: tuple[NDArray[Any], ...]
    notes: tuple[str, ...]

    def draft(self, graph: GraphFile) -> CardDraft:
        """Return what the package says of the model whose graph was read from `weights`.

        Raises:
            ModelError: the graph shows something else.
        """
        self._demand_channels(graph.input, self.description.input)
        outputs = self.description.outputs
        if self.endings and len(graph.outputs) != len(outputs):
            expected, found = f"a graph with the {len(outputs)} outputs that the package says", str(len(graph.outputs))
            raise self.files.refused(expected, found, "correct the package")
        output = self.said.output
        for port, facts, ending in zip(graph.outputs, outputs, self.endings, strict=False):
            self._demand_channels(port, facts)
            made = graph.activation_of(port.name)
            if "none" not in (made, ending.activation):
                found = f"{ending.activation} after the graph's own {made}"
                raise self.files.refused("one activation", found, TAKE_OUT)
            is_logit = made == ending.activation == "none"
            if ending.threshold is not None:
                threshold = float(expit(ending.threshold)) if is_logit else ending.threshold
                if not 0 < threshold < 1:
                    found = f"binarize at {threshold:g}"
                    raise self.files.refused("a threshold of probabilities, above 0 and below 1", found, TAKE_OUT)
                output = replace(output, threshold=threshold)
            elif is_logit and facts.span == (0, 1):
                # They are probabilities, whatever operator ends the graph.
                output = replace(output, activation="sigmoid")
        return replace(self.said, output=output)

    def expected_output(self, graph: GraphFile) -> ExpectedOutput | None:
        """Return the test tensors; None if there are none."""
        if not self.tests:
            return None
        endings = [replace(one, tensor=port.name) for one, port in zip(self.endings, graph.outputs, strict=True)]
        return ExpectedOutput(self.tests[0], tuple(zip(endings, self.tests[1:], strict=True)))

    def _demand_channels(self, port: Port, facts: TensorFacts) -> None:
        found = port.shape[facts.axes.index("c")]
        if found not in (None, facts.channels):
            expected = f"a graph with the {facts.channels} channels that the package says"
            raise self.files.refused(expected, f"{found} in {port.name}", "correct the package")


def read_package(source: Path) -> Package:
    """Read a package, a folder or a zip archive.

    Raises:
        ModelError: it is damaged, has no ONNX weights, or says what a card cannot.
    """
    files = PackageFiles(source)
    description = read_description(files)
    if description.weights is None:
        found = ", ".join(description.formats)
        remedy = "export the model to ONNX where it was trained: torch.onnx.export, or tf2onnx for Keras and TensorFlow"
        raise files.refused("ONNX weights in the package", found, remedy)
    try:
        normalisation, notes = normalisation_of(description.input)
        endings = [ending_of(facts) for facts in description.outputs]
    except ValueError as error:
        raise files.refused("processing that a card can say", str(error), TAKE_OUT) from error
    stars = next((ending for ending in endings if isinstance(ending, Stars)), None)
    # What becomes of stars is no tensor of the network.
    tensors = [description.input, *(() if stars else description.outputs)]
    for facts in tensors:
        if facts.axes not in _LAYOUT_OF or facts.axes != description.input.axes:
            expected = "2-D images with the axes batch, channel, y, x or batch, y, x, channel"
            raise files.refused(expected, ", ".join(facts.axes), "export the network of one 2-D image")
    tests, remarks = _tests(files, tensors) if stars is None else ((), ("stars are not compared with test tensors",))
    return Package(
        files=files,
        description=description,
        graph=PurePosixPath(description.weights.name).name,
        weights=_weights(files, (*description.beside, description.weights)),
        said=CardDraft(
            input=InputDraft(
                channels=_roles(description.input),
                normalisation=normalisation,
                size=description.input.size,
                pixel_size_um=description.input.pixel_size_um,
                layout=_LAYOUT_OF[description.input.axes],
            ),
            output=_output(description.outputs, endings, stars),
            stardist=StarDist(overlap=stars.overlap) if stars else None,
            name=description.name,
            licence=description.licence,
            citation=description.citation,
            training=description.origin,
        ),
        endings=tuple(ending for ending in endings if isinstance(ending, Ending)) if stars is None else (),
        tests=tests,
        notes=(*description.notes, *notes, *remarks),
    )


def _weights(files: PackageFiles, named: Sequence[NamedFile]) -> dict[str, bytes]:
    """Name of each file without its folder -> its content; all of them together are bounded."""
    weights: dict[str, bytes] = {}
    for file in named:
        room = LARGEST - sum(map(len, weights.values()))
        weights[PurePosixPath(file.name).name] = files.read(file.name, room, file.sha256)
    return weights


def _roles(tensor: TensorFacts) -> tuple[str, ...]:
    """Roles of the input's channels; () where the package does not say them."""
    if tensor.channels == 1:
        return ("grey",)
    if tuple(name.lower() for name in tensor.names) in _RGB:
        return ("rgb",)
    # What divides the roles in `channel` is in no role.
    return () if {",", "="} & set("".join(tensor.names)) else tensor.names


def _output(outputs: Sequence[TensorFacts], endings: Sequence[Ending | Stars], stars: Stars | None) -> OutputDraft:
    """What the package says about the outputs; the meaning of channels if they are named as a card names them."""
    margin = max(facts.margin for facts in outputs) or None
    if stars is not None:
        return OutputDraft(decoder="stardist", threshold=stars.threshold, margin=margin)
    names = outputs[0].names if len(outputs) == 1 and "foreground" in outputs[0].names else ()
    exclusive = any(isinstance(ending, Ending) and ending.activation == "softmax" for ending in endings)
    # A softmax is undone with the background's channel, which a person then has to name.
    return OutputDraft(channels=() if exclusive and BACKGROUND not in names else names, margin=margin)


def _tests(files: PackageFiles, tensors: Sequence[TensorFacts]) -> tuple[tuple[NDArray[Any], ...], tuple[str, ...]]:
    """The test tensors, () if not all are there and small; and remarks."""
    arrays = []
    for facts in tensors:
        if facts.test is None:
            return (), ("the package has no test tensors",)
        name = facts.test.name
        if len(files.head(name, LARGEST_TEST + 1)) > LARGEST_TEST:
            return (), (f"test tensors are not kept: {name} is above {LARGEST_TEST >> 20} MiB",)
        content = files.read(name, LARGEST_TEST, facts.test.sha256)
        try:
            array = npy_format.read_array(io.BytesIO(content), allow_pickle=False)
        except Exception as error:  # numpy's own errors
            raise files.refused(f"an array of numbers in {name}", brief(error), "correct the package") from error
        if not _fits(array, facts):
            expected = f"finite numbers with the axes {facts.axes} and {facts.channels} channels in {name}"
            raise files.refused(expected, f"{array.dtype} of shape {array.shape}", "correct the package")
        arrays.append(array)
    return tuple(arrays), ()


def _fits(array: NDArray[Any], facts: TensorFacts) -> bool:
    if array.ndim != len(facts.axes) or array.dtype.kind not in "biuf" or not array.size:
        return False
    return array.shape[facts.axes.index("c")] == facts.channels and bool(np.isfinite(array).all())
