"""What TensorRT, torch-tensorrt and CUDA do when something goes wrong, turned into errors that help.

They return False or None, raise classes of no common base, or log the reason and raise something else.  It must not
know what was asked of them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from cellseg_batch.engine.errors import BackendError, ModelError

# Of torch-tensorrt, and of TensorRT as it passes it on.
_LOGGERS = ("torch_tensorrt", "torch_tensorrt [TensorRT Conversion Context]")
_LONGEST_MESSAGE = 200


class RefusedError(Exception):
    """TensorRT answered a call with False or None; why is in its log."""


def demand(done: bool, call: str) -> None:
    """Go on only if a call gave True.

    Raises:
        RefusedError: it gave False.
    """
    if not done:
        raise RefusedError(f"{call} returned False")


def given(thing: Any, call: str) -> Any:
    """What a call gave.

    Raises:
        RefusedError: it gave None.
    """
    if thing is None:
        raise RefusedError(f"{call} returned None")
    return thing


class _Ear(logging.Handler):
    """Hears the errors that the libraries log, which say more than what they raise."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the head of a message; torch-tensorrt logs whole graphs."""
        self.heard.append(record.getMessage().strip().partition("\n")[0][:_LONGEST_MESSAGE])


@contextlib.contextmanager
def explained(task: str) -> Iterator[None]:
    """Keep the libraries' error logs off the screen, and turn a failure into an error that holds them.

    Args:
        task: completes "expected to ...".

    Raises:
        BackendError: whatever was raised inside, as what TensorRT could not do.
        ModelError: raised inside; no backend can run a broken model.
    """
    ear, loggers = _Ear(), [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addHandler(ear)
    try:
        yield
    except (BackendError, ModelError):
        raise
    except Exception as error:  # its failures share no class
        found = "; ".join([f"{type(error).__name__.removeprefix('_')}: {error}", *ear.heard])
        cause, remedy = _diagnosis(found)
        raise BackendError("TensorRT", expected=f"to {task}", found=found, cause=cause, remedy=remedy) from error
    finally:
        for logger in loggers:
            logger.removeHandler(ear)


def _diagnosis(found: str) -> tuple[str, str]:
    """Likely cause and remedy of what TensorRT, torch-tensorrt or CUDA said."""
    said = found.lower().replace(" ", "")
    if "outofmemory" in said or "create_execution_context" in said:
        return "a GPU that is out of memory", "choose a smaller `batch` or `tile`, or free the GPU"
    if "nullptr" in said:
        return "a driver older than this TensorRT", "update the NVIDIA driver, or choose another `backend`"
    if "deserialize_cuda_engine" in said:
        return "a plan of another TensorRT or GPU model, or a damaged one", "have it built anew"
    return "", "choose another `backend`"
