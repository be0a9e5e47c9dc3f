"""Networks of MONAI go through ONNX into a run: logits as untiled, labels the same for any block and any workers."""

import numpy as np
import onnxruntime
import pytest
import torch
import zarr
from monai.networks.nets import AttentionUnet, BasicUNet, HoVerNet, SegResNet

from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.reports.import_model import import_model
from tests.support.graphs import randomised, untiled, write_network
from tests.support.images import blobs, labels_of, write_ome_zarr

NARROW = (4, 4, 8, 8, 8, 4)
CHANNELS = {1: ["grey"], 2: ["nuclei", "membrane"], 3: ["rgb"]}


def basic_unet(channels, outputs):
    return BasicUNet(2, channels, outputs, features=NARROW, norm="batch")


def attention_unet(channels, outputs):
    network = AttentionUnet(2, channels, outputs, channels=(4, 8, 16), strides=(2, 2))
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.InstanceNorm2d):  # its merges have them, and would see the whole tile
                module.set_submodule(name, torch.nn.BatchNorm2d(child.num_features))
    return network


def seg_res_net(channels, outputs):
    return SegResNet(2, 8, channels, outputs, norm="batch", blocks_down=(1, 1), blocks_up=(1,))


def import_network(folder, channels, output):
    card = f"""
[input]
channels = {CHANNELS[channels]}
normalisation = {{kind = "fixed", low = 0, high = 255}}
[output]
{output}
"""
    (folder / "card.toml").write_text(card.replace("'", '"'))
    import_model(folder / "network.onnx", folder / "model", folder / "card.toml")
    return str(folder / "model")


def runs(segment, folder, pixels, model, **settings):
    """The labels of a run in small blocks by four workers, and of one in large blocks by one worker."""
    for block, workers in ((100, 4), (400, 1)):
        path = write_ome_zarr(folder / f"{block}.zarr", pixels)
        yield segment(
            path,
            model=model,
            backend="onnxruntime",
            block=block,
            workers=workers,
            skip_background="off",
            gate=False,
            **settings,
        )


@pytest.mark.parametrize(
    ("network", "channels", "outputs"),
    [
        (attention_unet, 2, 4),
        pytest.param(attention_unet, 3, 1, marks=pytest.mark.slow),
        pytest.param(basic_unet, 1, 4, marks=pytest.mark.slow),
        pytest.param(seg_res_net, 2, 4, marks=pytest.mark.slow),
    ],
)
def test_tiled_labels_are_those_of_the_untiled_network(tmp_path, segment, network, channels, outputs):
    torch.manual_seed(0)
    file = write_network(randomised(network(channels, outputs), channels), tmp_path / "network.onnx", channels)
    kinds = [f"kind {number}" for number in range(1, outputs)]
    names = f"channels = {['background', *kinds]}"
    output = f'decoder = "classes"\nclasses = {kinds}\n{names}' if kinds else 'decoder = "mask"'
    model = import_network(tmp_path, channels, output)
    card = load_model(model).card
    pixels = blobs(330, 390, channels)
    logits = untiled(file, pixels / np.float32(255), card.exact_margin, card.total_stride)
    if kinds:
        second, first = np.partition(logits, -2, axis=0)[-2:]
        expected, sure = logits.argmax(0), first - second > 1e-4
    else:
        expected, sure = logits[0] > 0, np.abs(logits[0]) > 1e-4
    settings = {"margin": "exact", "tile": 2 * card.exact_margin + 64}
    if channels == 2:
        settings["channel"] = "nuclei=0,membrane=1"
    small, large = runs(segment, tmp_path, pixels, model, **settings)
    assert small.slides[0].tiles > 20, small.slides[0].reason
    labels = labels_of(small)
    assert min(np.mean(labels == value) for value in range(max(2, outputs))) > 0.01
    np.testing.assert_array_equal(labels, labels_of(large))
    np.testing.assert_array_equal(labels[sure], expected[sure])


class Joined(torch.nn.Module):
    """HoVer-Net with its maps as a tuple, as ONNX wants outputs, to which bright blobs look like nuclei.

    Its own maps, which nothing has trained, are added as texture to those of a detector of blobs.
    """

    def __init__(self, network, example):
        super().__init__()
        self.network = network.eval()
        place = torch.arange(-8, 9) / 4
        bell = torch.exp(-(place**2) / 2)
        smooth, slope = bell / bell.sum(), place * bell / (place * bell).abs().sum()
        # Light falls to the right where the horizontal map rises.
        kernels = [torch.outer(smooth, smooth), torch.outer(smooth, -slope), torch.outer(-slope, smooth)]
        self.register_buffer("kernels", torch.stack(kernels)[:, None])
        with torch.no_grad():
            maps = self.maps(example)
            self.level = self.light(example, maps[0].shape[-1])[:, :1].mean().item()
        self.means = [values.mean((0, 2, 3), keepdim=True) for values in maps]
        self.gains = [spread / values.std().item() for spread, values in zip((0.5, 0.05, 4), maps, strict=True)]

    def maps(self, pixels):
        maps = self.network(pixels)
        return [maps[name] for name in ("nucleus_prediction", "horizontal_vertical", "type_prediction")]

    def light(self, pixels, side):
        crop = (pixels.shape[-1] - side) // 2 - 8
        inner = pixels[:, :1, crop : crop + side + 16, crop : crop + side + 16]
        return torch.nn.functional.conv2d(inner, self.kernels)

    def forward(self, pixels):
        nuclei, places, types = (
            gain * (maps - mean) for gain, maps, mean in zip(self.gains, self.maps(pixels), self.means, strict=True)
        )
        light = self.light(pixels, nuclei.shape[-1])
        foreground = 10 * (light[:, :1] - self.level)
        return nuclei + torch.cat([-foreground, foreground], 1), places + 4 * light[:, 1:], types


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "side", "crop"), [("fast", 256, 46), ("original", 270, 95)])
def test_a_hover_net_gives_what_it_gives_tile_by_tile(tmp_path, segment, mode, side, crop):
    torch.manual_seed(0)
    example = torch.from_numpy(blobs(side, side)[None] / np.float32(255))
    network = Joined(HoVerNet(mode=mode, in_channels=3, out_classes=3), example)
    outputs = ("np", "hv", "types")
    file = write_network(network, tmp_path / "network.onnx", dynamic=False, side=side, outputs=outputs)
    output = f"""decoder = "hover"
margin = {crop}
classes = ["tumour", "stroma"]
tensors = [
    {{name = "np", channels = ["background", "foreground"]}},
    {{name = "hv", channels = ["horizontal", "vertical"]}},
    {{name = "types", channels = ["no class", "tumour", "stroma"]}},
]"""
    model = import_network(tmp_path, 3, output)
    margin = crop + 9  # the decoder looks 9 px around
    core = side - 2 * margin
    pixels = blobs(core, 2 * core)
    small, large = runs(segment, tmp_path, pixels, model, tile=None, objects=True, probability=True)
    assert (small.margin, small.slides[0].tiles) == (margin, 2), small.slides[0].reason
    labels = labels_of(small)
    np.testing.assert_array_equal(labels, labels_of(large))
    assert small.slides[0].objects == len(np.unique(labels)) - 1 > 5
    padded = np.pad(pixels / np.float32(255), ((0, 0), (margin, margin), (margin, margin)), mode="reflect")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    inner = slice(margin - crop, margin - crop + core)
    logits = np.empty((core, 2 * core), np.float32)
    for x in (0, core):
        maps = session.run(["np"], {"x": padded[None, :, :, x : x + side]})[0][0]
        logits[:, x : x + core] = (maps[1] - maps[0])[inner, inner]
    probability = zarr.open_array(f"{small.slides[0].outputs['probability']}/0", mode="r")[...]
    assert np.abs(probability - 255 / (1 + np.exp(-logits))).max() < 0.6
    assert not labels[logits < -1e-4].any()
