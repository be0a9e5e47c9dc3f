"""Networks that tests run: stand-ins of known reach, and real ones with statistics as if trained."""

from contextlib import nullcontext

import torch
from scipy.ndimage import maximum_filter1d
from torch import nn

from cellseg_batch.engine.inference.cpu_predictor import CpuPredictor
from cellseg_batch.engine.inference.session import Session, compile_network
from cellseg_batch.engine.stage_clock import StageClock

# The architecture of the bundle that most tests run.
TINY = {"name": "stem-unet", "in_channels": 3, "outputs": 3, "width": 4, "depth": 3}


class Filter:
    """A stand-in network that sees exactly ``reach`` px to each side and is wrong near a tile's edge."""

    def __init__(self, reach):
        self.reach = reach

    def __call__(self, batch, out=None):
        grown = batch
        for axis in (2, 3):
            grown = maximum_filter1d(grown, 2 * self.reach + 1, axis=axis, mode="constant", cval=1.0)
        return (0.75 * batch - 0.25 * grown)[:, :1].copy()


class Alone:
    """A stand-in backend of one network, for normalised pixels only."""

    def __init__(self, network):
        self.network = network

    def compile(self, shape):
        return self.network

    def compile_bytes(self, shape):
        return None


def predictor_of(backend, rule):
    """A predictor with one session on ``backend``, without a pool."""
    session = Session(compile_network(backend, rule.shape, rule.dtype))
    return CpuPredictor(lambda: nullcontext(session), rule, StageClock())


NETWORKS = [
    ({"name": "stem-unet", "width": 8, "depth": 3, "merge_convs": 1}, 2),
    ({"name": "unet", "width": 8, "depth": 4}, 3),
    ({"name": "unet", "width": 8, "depth": 4, "up": "bilinear"}, 0),
    ({"name": "unet-plus", "width": 8, "depth": 3}, 2),
    ({"name": "unet-resnet34"}, 5),
    # Its deepest features have five times as many channels as they are enlarged to.
    ({"name": "unet-mobilenetv2"}, 4),
]


def trained(network):
    """Any network, as if it had been trained: every weight and statistic away from where it starts."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    return network.eval()
