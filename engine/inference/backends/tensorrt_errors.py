"""Turn failures of TensorRT, torch-tensorrt and CUDA into errors that name cause and remedy.

These libraries return False or None, raise exceptions without a common base class, or log the reason and raise another
error.  It must not know which task they were running.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from cellseg_batch.engine.errors import BackendError, ModelError

# Loggers of torch-tensorrt, and of TensorRT, whose log torch-tensorrt passes on.
_LOGGERS = ("torch_tensorrt", "torch_tensorrt [TensorRT Conversion Context]")
_LONGEST_MESSAGE = 200  # characters


class RefusedError(Exception):
    """TensorRT returned False or None from a call; its log has the reason."""


def demand(done: bool, call: str) -> None:
    """Check that a call returned True.

    Raises:
        RefusedError: it returned False.
    """
    if not done:
        raise RefusedError(f"{call} returned False")


def demand_result(result: Any, call: str) -> Any:
    """Return the result of a call.

    Raises:
        RefusedError: the result is None.
    """
    if result is None:
        raise RefusedError(f"{call} returned None")
    return result


class _ErrorCollector(logging.Handler):
    """Collects the errors that the libraries log, which say more than the exceptions that they raise."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the beginning of the first line; torch-tensorrt logs whole graphs."""
        self.messages.append(record.getMessage().strip().partition("\n")[0][:_LONGEST_MESSAGE])


@contextlib.contextmanager
def explained(task: str) -> Iterator[None]:
    """Collect the libraries' error logs, and raise any failure as an error that includes them.

    Args:
        task: the task, as a verb phrase that completes "expected to ...".

    Raises:
        BackendError: the task failed, or raised one itself.
        ModelError: the task raised it; no backend can run a broken model.
    """
    collector, loggers = _ErrorCollector(), [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addHandler(collector)
    try:
        yield
    except (BackendError, ModelError):
        raise
    except Exception as error:  # the libraries' exceptions share no base class
        failure = "; ".join([f"{type(error).__name__.removeprefix('_')}: {error}", *collector.messages])
        cause, remedy = _diagnosis(failure)
        raise BackendError("TensorRT", expected=f"to {task}", found=failure, cause=cause, remedy=remedy) from error
    finally:
        for logger in loggers:
            logger.removeHandler(collector)


def _diagnosis(failure: str) -> tuple[str, str]:
    """Return likely cause and remedy of a failure text from TensorRT, torch-tensorrt or CUDA."""
    text = failure.lower().replace(" ", "")
    if "outofmemory" in text or "create_execution_context" in text:
        return "a GPU that is out of memory", "choose a smaller `batch` or `tile`, or free the GPU"
    if "nullptr" in text:
        return "a driver older than this TensorRT", "update the NVIDIA driver, or choose another `backend`"
    if "deserialize_cuda_engine" in text:
        return "a plan of another TensorRT or GPU model, or a damaged one", "have it built anew"
    return "", "choose another `backend`"
