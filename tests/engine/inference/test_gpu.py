"""What only a GPU can show of the torch backends and the pipeline.

Run it there on its own, as other tests interpret Triton's kernels:
``pytest -m gpu tests/engine/inference/test_gpu.py``.
"""

import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from cellseg_batch.engine.geometry import fit_lattice, lay_blocks
from cellseg_batch.engine.inference.backends.cuda import Device
from cellseg_batch.engine.inference.backends.gate import limits_of, logits_of, measure_parity, real_tiles
from cellseg_batch.engine.inference.backends.registry import make_backend
from cellseg_batch.engine.inference.decoders import DECODERS
from cellseg_batch.engine.inference.gpu_admission import Admission
from cellseg_batch.engine.inference.gpu_batch_queue import BatchQueue
from cellseg_batch.engine.inference.normalise import Bounds
from cellseg_batch.engine.inference.prediction import PredictionRule
from cellseg_batch.engine.models import load_model
from cellseg_batch.engine.stage_clock import StageClock
from cellseg_batch.engine.storage.cache import Artefacts

pytestmark = pytest.mark.gpu

PLACE = "cuda:0"
BACKENDS = ["torch-cuda", "torch-compile"]


@pytest.fixture(scope="module")
def bundle():
    return load_model("nuclei")


@pytest.fixture(scope="module")
def tiles(bundle):
    return real_tiles("gate", bundle.card.input.count)


@pytest.fixture(scope="module")
def image(tiles):
    """A picture (3, 1024, 2048) uint8 of real tiles."""
    rows = [np.concatenate(list(np.resize(tiles, (8, *tiles.shape[1:]))[4 * y : 4 * y + 4]), axis=2) for y in (0, 1)]
    return np.round(255 * np.concatenate(rows, axis=1)).astype(np.uint8)


def backend_of(bundle, name="torch-cuda"):
    return make_backend(bundle, name, "fp16", 1, Artefacts(), PLACE)


@pytest.mark.parametrize("name", BACKENDS)
def test_masks_of_real_tiles_agree_with_torch_fp32(bundle, tiles, name):
    shape = (1, *tiles.shape[1:])
    reference = make_backend(bundle, "torch", "fp32", 4, Artefacts())
    logits, expected = (logits_of(one.compile(shape), tiles) for one in (backend_of(bundle, name), reference))
    parity = measure_parity(logits, expected, bundle.card.threshold, DECODERS[bundle.card.decoder])
    print(name, parity)
    assert parity.within(limits_of("fp16")), parity


@pytest.mark.parametrize("name", BACKENDS)
def test_the_graph_gives_what_a_plain_launch_gives(bundle, tiles, name):
    batch = np.ascontiguousarray(tiles[:2])
    model = backend_of(bundle, name).compile(batch.shape)
    replayed = model(batch).copy()
    assert np.abs(replayed).max() > 1
    np.testing.assert_array_equal(model(batch, plain=True), replayed)
    assert not np.array_equal(model(np.zeros_like(batch)), replayed)
    np.testing.assert_array_equal(model(batch), replayed)


def queue_of(backend, lattice, batch):
    return queue_before(lambda count: backend.compile((count, 3, *lattice.tile)), batch)


def queue_before(compile_model, batch):
    return BatchQueue(Device(PLACE), compile_model, batch, Admission(), lambda: False)


def segment(queue, lattice, image, block, stitch="crop", at_once=1):
    """The mask of an image, its blocks by several threads; and the number of foreground pixels that was counted."""
    from cellseg_batch.engine.inference.gpu_predictor import GpuPredictor

    rule = PredictionRule(
        lattice, (1, 3, *lattice.tile), image.dtype, Bounds((0.0,), (255.0,)), 0.5, probability=True, stitch=stitch
    )
    predictor = GpuPredictor(lambda: nullcontext(queue), rule, StageClock())
    mask, counted = np.full(image.shape[1:], 9, np.uint8), []
    blocks = list(lay_blocks(lattice, block, ring=stitch == "blend"))

    def work(first):
        for part in blocks[first::at_once]:
            result = predictor.predict(image[(slice(None), *part.read_box.slices())], part)
            mask[part.box.slices()] = result.mask
            assert ((result.probability >= 128) == result.mask).mean() > 0.99
            counted.append(result.foreground)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counted) == len(blocks)
    return mask, sum(counted)


@pytest.mark.parametrize("stitch", ["crop", "blend"])
def test_a_mask_depends_neither_on_blocks_nor_on_threads(bundle, image, stitch):
    lattice = fit_lattice(image.shape[1:], 384, 64, bundle.card.total_stride)
    queue = queue_of(backend_of(bundle), lattice, 4)
    expected, count = segment(queue, lattice, image, 4096, stitch)
    assert 0 < count == expected.sum() < expected.size
    for block, at_once in ((300, 1), (300, 8), (600, 3)):
        mask, again = segment(queue, lattice, image, block, stitch, at_once)
        # cuDNN promises the same bits only for the same batch, and which tiles share a batch depends on the threads.
        assert (mask != expected).mean() <= 1e-5
        assert again == mask.sum()
    assert queue.busy_seconds() >= 0


def test_the_gpus_mask_is_that_of_its_logits_on_the_cpu(bundle, image):
    """Gather and stitch on the GPU against those of the CPU, around the same network."""
    from cellseg_batch.kernels.gather import gather
    from cellseg_batch.kernels.stitch import stitch_mask

    lattice = fit_lattice(image.shape[1:], 384, 64, bundle.card.total_stride)
    model = backend_of(bundle).compile((1, 3, *lattice.tile))
    queue = queue_before(lambda count: model, 1)
    mask, _ = segment(queue, lattice, image, 4096)
    expected, batch = np.empty_like(mask), np.empty((1, 3, *lattice.tile), np.float32)
    (block,) = lay_blocks(lattice, 4096)
    from cellseg_batch.engine.inference.prediction import source_tables
    from cellseg_batch.engine.inference.stitching import core_places

    for tile in block.tiles:
        tables = source_tables([tile], lattice.shape, block.read_box)
        gather(image, *tables, 0.0, 1 / 255, batch)
        stitch_mask(model(batch), core_places([tile], block.box), 0.0, expected)
    np.testing.assert_array_equal(mask, expected)


def test_a_full_gpu_makes_smaller_batches_and_the_same_mask_but_for_rounding(bundle, image):
    lattice = fit_lattice(image.shape[1:], 512, 64, bundle.card.total_stride)
    backend = backend_of(bundle)
    expected, _ = segment(queue_of(backend, lattice, 1), lattice, image, 4096)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    total = torch.cuda.get_device_properties(PLACE).total_memory
    queue = queue_of(backend, lattice, 64)
    torch.cuda.set_per_process_memory_fraction((held + (2 << 30)) / total)
    try:
        mask, _ = segment(queue, lattice, image, 4096)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print("batches of", queue.batch)
    assert queue.batch < 64
    assert (mask != expected).mean() <= 5e-4


def test_nothing_of_a_model_stays_on_the_device(bundle, tiles):
    backend, shape = backend_of(bundle), (4, *tiles.shape[1:])
    backend.compile(shape)(np.ascontiguousarray(tiles[:4]))
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    for _ in range(5):
        backend.compile(shape)(np.ascontiguousarray(tiles[:4]))
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] >= free - (256 << 20)
