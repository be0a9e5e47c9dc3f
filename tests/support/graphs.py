"""Networks of others as ONNX files, and what they give for a whole image."""

import warnings

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.support.images import blobs


def randomised(network, channels=3):
    """Make a network in evaluation mode whose output is neither all low nor all high on `blobs`."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return Centred(network.eval(), torch.from_numpy(blobs(128, 128, channels)[None] / np.float32(255)))


class Centred(torch.nn.Module):
    """A network whose outputs are spread around 0 on an example, each of them."""

    def __init__(self, network, example):
        super().__init__()
        self.network = network
        with torch.no_grad():
            logits = network(example)
        outputs = logits.movedim(1, 0).flatten(1)
        self.register_buffer("middle", outputs.median(dim=1).values[:, None, None])
        self.register_buffer("gain", 4 / outputs.std(dim=1)[:, None, None])

    def forward(self, pixels):
        return (self.network(pixels) - self.middle) * self.gain


def write_network(network, path, channels=3, dynamic=True, side=128, outputs=("y",)):
    """Write a torch network as an ONNX file, for tiles of any size or of ``side`` px alone; returns the path."""
    axes = {name: {0: "n", 2: "h", 3: "w"} for name in ("x", *outputs)} if dynamic else None
    example = torch.zeros(2 if dynamic else 1, channels, side, side)
    names = {"input_names": ["x"], "output_names": list(outputs), "opset_version": 17}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(network, (example,), str(path), dynamo=False, dynamic_axes=axes, **names)
    return path


def write_graph(path, nodes, shape, gives, weights=(), opset=17, outputs=("y",), dtype=TensorProto.FLOAT):
    """Write a graph of one input x of ``shape`` and some outputs of ``gives``, by hand; returns the path."""
    import onnx

    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info(name, dtype, gives) for name in outputs],
        [numpy_helper.from_array(values, name) for name, values in dict(weights).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(model, path)
    return path


def untiled(path, pixels, margin, stride):
    """Logits (K, H, W) of normalised pixels (C, H, W) that the file's network is shown in one piece, mirrored."""
    height, width = pixels.shape[1:]
    ends = [margin + -(side + 2 * margin) % stride for side in (height, width)]
    image = np.pad(pixels, ((0, 0), (margin, ends[0]), (margin, ends[1])), mode="reflect").astype(np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: image[None]})
    return logits[0, :, margin : margin + height, margin : margin + width]
