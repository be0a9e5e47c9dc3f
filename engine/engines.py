"""The backends and compiled models of a run: each made once, kept, and its time counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from cellseg_batch.engine.backends.backend import Backend, CompiledModel, Shape
from cellseg_batch.engine.backends.choose import choose_backend, make_backend
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.settings import Settings
from cellseg_batch.trainer.bundle import Bundle


class Engines:
    """Makes and keeps what the slides of a run share.

    Args:
        bundle: the model.
        settings: say which backend, precision and threads.

    Attributes:
        chosen: the backend of every slide that was not begun with another one.
        seconds: spent on choosing, compiling and warming up.

    Raises:
        BackendError: no backend can do what was asked.
    """

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self.bundle = bundle
        self.seconds = 0.0
        self._threads = settings.threads or cores()
        with self.counted():
            self.chosen = choose_backend(bundle, settings.backend, settings.precision, self._threads)
        self._backends = {(self.chosen.name, self.chosen.precision): self.chosen}
        self._compiled: tuple[tuple[str, str, Shape], CompiledModel] | None = None

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the time spent inside as compiling."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def backend(self, name: str, precision: str) -> Backend:
        """A backend by name, for a slide that was begun with it.

        Raises:
            BackendError: it is not to be had here.
        """
        if (name, precision) not in self._backends:
            with self.counted():
                self._backends[name, precision] = make_backend(self.bundle, name, precision, self._threads)
        return self._backends[name, precision]

    def compiled(self, backend: Backend, shape: Shape) -> CompiledModel:
        """The model compiled for a batch shape; only the last one is kept, as each holds its own memory."""
        key = (backend.name, backend.precision, shape)
        if self._compiled is None or self._compiled[0] != key:
            self._compiled = None
            with self.counted():
                self._compiled = (key, backend.compile(shape))
        return self._compiled[1]
