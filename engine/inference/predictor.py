"""Turn the pixels of one slide's blocks into masks, through one interface for CPUs and GPUs."""

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
    """Predicts the blocks of one slide; several threads may call it at once."""

    def predict(self, pixels: NDArray[Any], block: Block) -> BlockResult:
        """Predict ``block`` from the pixels (C, h, w) of its read box; pixels outside its tiles become background.

        Raises:
            ComputeError: the model returned NaN, or memory is full.
        """
        ...


def make_predictor(model_pool: ModelPool, backend: Backend, rule: PredictionRule, clock: StageClock) -> Predictor:
    """Return the predictor of one slide; for each block it takes a session or a GPU's queue from the pool.

    Args:
        model_pool: model pool of the process.
        backend: backend from the pool, for the slide's downscale factor.
        rule: prediction rule of the slide.
        clock: counts the stages.
    """
    if model_pool.has_queue(backend):
        from cellseg_batch.engine.inference.gpu_predictor import GpuPredictor  # imports torch

        return GpuPredictor(partial(model_pool.queue, backend, rule.downscale, rule.shape), rule, clock)
    return CpuPredictor(partial(model_pool.session, backend, rule.shape, rule.dtype), rule, clock)
