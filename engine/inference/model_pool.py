"""Make, keep and share the backends and compiled networks of a process; one network runs at a time."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import DTypeLike

from cellseg_batch.engine.backend_table import KNOWN_BACKENDS
from cellseg_batch.engine.inference.backends.protocol import Backend, DeviceModel, Shape
from cellseg_batch.engine.inference.backends.registry import make_backend
from cellseg_batch.engine.inference.choice import Choice, choose
from cellseg_batch.engine.inference.decoders import DECODERS
from cellseg_batch.engine.inference.probes import Probes
from cellseg_batch.engine.inference.session import Network, Session, compile_network
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.settings import Settings, gpus_of
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle

if TYPE_CHECKING:
    from cellseg_batch.engine.inference.gpu_batch_queue import BatchQueue

# Compiled networks are kept while the area of all their batches is at most this, in px: two large tiles, or the many
# shapes of a folder of small images.
_KEPT_AREA = 2 * Settings.tile**2

# Sessions per network: one thread cuts or stitches its tiles while another thread's tiles run.
_SESSIONS = 2

# Batch shapes whose models stay on a GPU: one for the current slide, one for the next slide in preparation.
_KEPT_QUEUES = 2

# (backend, batch shape, pixel dtype) that a network is compiled for.
_Key = tuple[Backend, Shape, np.dtype[Any]]


class ModelPool:
    """Makes and keeps the models that the slides of a run share in one process.

    Args:
        bundle: the model.
        settings: settings with model, backend, precision and threads.
        racing: called before a race is run, which happens if this machine has no result for this model.
        choice: choice of the backend, if it was made already.

    Attributes:
        choice: choice of the backend.
        chosen: the chosen backend.
        probes: sessions for the windows that show the size of nuclei.
        seconds: time spent on choosing, compiling and warming up, in seconds.
        models_lock: lock held by the thread that makes or looks up models.

    Raises:
        BackendError: no backend fits the settings.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: Settings,
        racing: Callable[[], None] = lambda: None,
        choice: Choice | None = None,
    ) -> None:
        self.bundle = bundle
        # Outputs that a mask does not need take a twentieth of the time and twice the foreground's memory.
        self._network = DECODERS[bundle.card.decoder].network(bundle, instances=settings.makes_ids)
        self.seconds = 0.0
        self.models_lock = threading.RLock()
        self._run_lock = threading.RLock()
        self._gpus = gpus_of(settings.device)
        self._artefacts = Artefacts()
        with self.counted():
            self.choice = choice or choose(settings, bundle, racing)
            self._threads = settings.threads or cores()
            winner = self.choice.backend, self.choice.precision
            self.chosen = make_backend(self._network, *winner, self._threads, self._artefacts, self._gpus[0])
        self._backends = {(self.chosen.name, self.chosen.precision, 1, self._gpus[0]): self.chosen}
        self._queues: OrderedDict[tuple[Backend, Shape], Iterator[BatchQueue]] = OrderedDict()
        self._sessions: dict[_Key, _Sessions] = {}
        self.probes = Probes(self._run_lock, self.counted)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the time spent inside as compiling."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def backend(self, name: str, precision: str, downscale: int = 1, gpu: str | None = None) -> Backend:
        """Return a backend by name, for images downscaled by ``downscale``; on the first GPU unless ``gpu`` is named.

        Raises:
            BackendError: the backend is not available on this machine.
        """
        key = (name, precision, downscale, gpu or self._gpus[0])
        with self.models_lock:
            if key not in self._backends:
                with self.counted():
                    bundle = self._network.downscaled(downscale)
                    self._backends[key] = make_backend(bundle, name, precision, self._threads, self._artefacts, key[-1])
            return self._backends[key]

    def downscaled(self, backend: Backend, factor: int) -> Backend:
        """Return the backend of the same library and precision for images downscaled by ``factor``."""
        return self.backend(backend.name, backend.precision, factor)

    def race_result_of(self, backend: Backend) -> dict[str, Any] | None:
        """Return the figures of a backend's race and its conditions as plain values; None without a race."""
        if self.choice.race_result is None:
            return None
        content = self.choice.race_result.to_json()
        rows = content.pop("candidates")
        name = (backend.name, backend.precision)
        return content | next((row for row in rows if (row["backend"], row["precision"]) == name), {})

    @contextmanager
    def session(self, backend: Backend, shape: Shape, dtype: DTypeLike) -> Iterator[Session]:
        """Lend a session for batches of ``shape`` and pixels of ``dtype``; no other thread has it in the context.

        Each network has two sessions; a third thread waits.
        """
        with self.models_lock:
            key = (backend, shape, np.dtype(dtype))
            sessions = self._sessions.pop(key, None)
            if sessions is None:
                self._drop_idle_networks(shape)
                with self.counted():
                    sessions = _Sessions(compile_network(backend, shape, dtype), self._run_lock)
            self._sessions[key] = sessions  # most recently used last
            users = sessions.enter()
        with users as session:
            yield session

    def has_queue(self, backend: Backend) -> bool:
        """Whether the GPU gathers and stitches whole blocks through `queue`.

        Without Triton the host gathers and stitches, and the GPU only runs the network.
        """
        return KNOWN_BACKENDS[backend.name].on_gpu and find_spec("triton") is not None

    def queue(self, backend: Backend, downscale: int, shape: Shape) -> BatchQueue:
        """Return a GPU's queue for batches of ``shape``, each GPU in turn; only for backends with `has_queue`."""
        from cellseg_batch.engine.inference.backends import cuda
        from cellseg_batch.engine.inference.gpu_batch_queue import BatchQueue

        with self.models_lock:
            key = (backend, shape)
            if key not in self._queues:
                queues = []
                for gpu in self._gpus:
                    gpu_backend = self.backend(backend.name, backend.precision, downscale, gpu)
                    queues.append(BatchQueue(cuda.Device(gpu), partial(_compile_batch, gpu_backend, shape), shape[0]))
                self._queues[key] = cycle(queues)
            self._queues.move_to_end(key)
            while len(self._queues) > _KEPT_QUEUES:
                self._queues.popitem(last=False)
            return next(self._queues[key])

    def _drop_idle_networks(self, shape: Shape) -> None:
        """Drop the least recently used idle networks until one for ``shape`` fits: each holds its own memory."""
        areas = {key: math.prod(key[1]) // key[1][1] for key in self._sessions}
        free_area = _KEPT_AREA - math.prod(shape) // shape[1]
        for key in areas:
            if not self._sessions[key].users and sum(areas[held] for held in self._sessions) > free_area:
                del self._sessions[key]


class _Sessions:
    """The sessions of one network, each for one thread at a time.

    Attributes:
        users: number of threads that have a session or wait for one.
    """

    def __init__(self, network: Network, run_lock: AbstractContextManager[Any]) -> None:
        self.users = 0
        self._lock = threading.Lock()
        self._idle: SimpleQueue[Session] = SimpleQueue()
        for _ in range(_SESSIONS):
            self._idle.put(Session(network, run_lock))

    def enter(self) -> AbstractContextManager[Session]:
        """Count the caller as a user; the returned context waits for a session and gives it back."""
        with self._lock:
            self.users += 1
        return self._use()

    @contextmanager
    def _use(self) -> Iterator[Session]:
        session = self._idle.get()
        try:
            yield session
        finally:
            self._idle.put(session)
            with self._lock:
                self.users -= 1


def _compile_batch(backend: Backend, shape: Shape, batch: int) -> DeviceModel:
    """Compile the model for batches of ``batch`` tiles; all GPU backends compile to a `DeviceModel`."""
    return cast("DeviceModel", backend.compile((batch, *shape[1:])))
