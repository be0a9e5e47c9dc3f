"""Networks of one convolution, imported from ONNX: a model of each decoder whose result follows from the pixels."""

import numpy as np
from onnx import helper

from cellseg_batch.engine.reports.import_model import import_model
from tests.support.graphs import write_graph

# Decoder -> (weight of the pixel, or of its slope along x or y, and bias) of each output of a 3 x 3 px convolution.
BRIGHT, FLAT = (20, 0, 0, -8), (0, 0, 0, -5)
CONVOLUTIONS = {
    "mask": (BRIGHT,),
    "seeds": (BRIGHT, FLAT, (20, 0, 0, -9)),
    "hover": (BRIGHT, (0, -4, 0, 0), (0, 0, -4, 0)),
    "stardist": (BRIGHT, *[(0, 0, 0, 5)] * 8),
    "classes": ((0, 0, 0, 0), (10, 0, 0, -3), (20, 0, 0, -9)),
}


def write_convolution(folder, decoder, channels=("grey",)):
    """Import a network of one convolution; returns the bundle's folder."""
    folder.mkdir(exist_ok=True)
    taps = np.zeros((3, 3, 3), np.float32)
    taps[0, 1, 1], taps[1, 1], taps[2, :, 1] = 1, (-1, 0, 1), (-1, 0, 1)
    rows = np.float32(CONVOLUTIONS[decoder])
    count = 3 if channels == ("rgb",) else len(channels)
    kernels = np.einsum("ks,syx->kyx", rows[:, :3], taps)[:, None].repeat(count, axis=1)
    weights = {"w": kernels, "b": rows[:, 3]}
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=[1, 1, 1, 1])]
    shape, gives = ("n", kernels.shape[1], "h", "w"), ("n", len(rows), "h", "w")
    write_graph(folder / f"{decoder}.onnx", nodes, shape, gives, weights)
    named = 'classes = ["dim", "bright"]' if decoder == "classes" else ""
    if decoder == "stardist":
        named = 'channels = ["probability", "rays"]'
    card = f"""
[input]
channels = {list(channels)}
normalisation = {{kind = "percentile", low = 1, high = 99}}
[output]
decoder = "{decoder}"
margin = 16
{named}
"""
    (folder / "card.toml").write_text(card)
    import_model(folder / f"{decoder}.onnx", folder / decoder, folder / "card.toml")
    return folder / decoder
