"""What turns the pixels of one slide's blocks into masks: the same face on a CPU and on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

from numpy.typing import NDArray

from cellseg_batch.engine.geometry import Block
from cellseg_batch.engine.inference.backends.protocol import Backend
from cellseg_batch.engine.inference.cpu_predictor import CpuPredictor
from cellseg_batch.engine.inference.model_pool import ModelPool
from cellseg_batch.engine.inference.prediction import BlockResult, PredictionRule
from cellseg_batch.engine.stage_clock import StageClock


class Predictor(Protocol):
    """Belongs to one slide; several threads may call it at once."""

    def predict(self, pixels: NDArray[Any], block: Block) -> BlockResult:
        """The result of ``block`` from the pixels (C, h, w) of its read box; background where it has no tiles.

        Raises:
            ComputeError: the model gives no usable numbers.
        """
        ...


def make_predictor(model_pool: ModelPool, backend: Backend, rule: PredictionRule, clock: StageClock) -> Predictor:
    """The predictor of one slide, which takes a session or a GPU's queue from the pool for each block.

    Args:
        model_pool: of the process.
        backend: one of the pool's, for the slide's scale.
        rule: of the slide.
        clock: counts the stages.
    """
    # The seeds of instances are made on the host, so there a GPU only computes the logits.
    if rule.instances is None and model_pool.has_queue(backend):
        from cellseg_batch.engine.inference.gpu_predictor import GpuPredictor  # and with it torch

        return GpuPredictor(partial(model_pool.queue, backend, rule.downscale, rule.shape), rule, clock)
    return CpuPredictor(partial(model_pool.session, backend, rule.shape, rule.dtype), rule, clock)
