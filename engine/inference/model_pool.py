"""The backends and compiled networks of a process: made once, kept, run one at a time, their time counted."""

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
from cellseg_batch.engine.inference.probes import Probes
from cellseg_batch.engine.inference.session import Network, Session, compile_network
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.settings import Settings, gpus_of
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle

if TYPE_CHECKING:
    from cellseg_batch.engine.inference.gpu_batch_queue import BatchQueue

# Compiled networks are kept while their batches are no larger together than this, in px: two large tiles, or the many
# shapes of a folder of small images.
_KEPT_AREA = 2 * Settings.tile**2

# Of a network: one thread cuts or stitches its tiles while the other's run.
_SESSIONS = 2

# Tile sizes whose models stay on a GPU: of a slide, and of the next one that is being prepared.
_KEPT_QUEUES = 2

# What a network is compiled for.
_Key = tuple[Backend, Shape, np.dtype[Any]]


class ModelPool:
    """Makes and keeps the models that the slides of a run share in one process.

    Args:
        bundle: the model.
        settings: say which model, backend, precision and threads.
        racing: called if no race of this model is known on this machine yet, before it is run.
        choice: of the backend, if that is settled already.

    Attributes:
        choice: which backend is to be used.
        chosen: that backend.
        probes: for windows that show how large nuclei are.
        seconds: spent on choosing, compiling and warming up.
        models_lock: held by the thread that makes models, or looks whether one is there.

    Raises:
        BackendError: no backend can do what was asked.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: Settings,
        racing: Callable[[], None] = lambda: None,
        choice: Choice | None = None,
    ) -> None:
        self.bundle = bundle
        # What a mask does not need costs a twentieth of the time, and twice its size in memory.
        self._outputs = bundle if settings.instances or settings.objects else bundle.foreground
        self.seconds = 0.0
        self.models_lock = threading.RLock()
        self._run_lock = threading.RLock()
        self._gpus = gpus_of(settings.device)
        self._artefacts = Artefacts()
        with self.counted():
            self.choice = choice or choose(settings, bundle, racing)
            self._threads = settings.threads or cores()
            winner = self.choice.backend, self.choice.precision
            self.chosen = make_backend(self._outputs, *winner, self._threads, self._artefacts, self._gpus[0])
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
        """A backend by name, for images downscaled by ``downscale``; on the first GPU unless another one is named.

        Raises:
            BackendError: it is not to be had here.
        """
        key = (name, precision, downscale, gpu or self._gpus[0])
        with self.models_lock:
            if key not in self._backends:
                with self.counted():
                    bundle = self._outputs.shrunk(downscale)
                    self._backends[key] = make_backend(bundle, name, precision, self._threads, self._artefacts, key[-1])
            return self._backends[key]

    def downscaled(self, backend: Backend, factor: int) -> Backend:
        """The same library and precision, for images downscaled by ``factor``."""
        return self.backend(backend.name, backend.precision, factor)

    def race_result_of(self, backend: Backend) -> dict[str, Any] | None:
        """What the race says of a backend, with its conditions; None if it was not raced."""
        if self.choice.race_result is None:
            return None
        content = self.choice.race_result.to_json()
        rows = content.pop("candidates")
        name = (backend.name, backend.precision)
        return content | next((row for row in rows if (row["backend"], row["precision"]) == name), {})

    @contextmanager
    def session(self, backend: Backend, shape: Shape, dtype: DTypeLike) -> Iterator[Session]:
        """A session for batches of ``shape`` and a type of pixels, this thread's own while the context lasts.

        There are two for each network; a third thread waits.
        """
        with self.models_lock:
            key = (backend, shape, np.dtype(dtype))
            sessions = self._sessions.pop(key, None)
            if sessions is None:
                self._make_room(shape)
                with self.counted():
                    sessions = _Sessions(compile_network(backend, shape, dtype), self._run_lock)
            self._sessions[key] = sessions  # the last one used comes last
            users = sessions.enter()
        with users as session:
            yield session

    def has_queue(self, backend: Backend) -> bool:
        """Whether blocks go through a GPU as a whole, by `queue`.

        Without Triton they do not: the host cuts and stitches then, and the GPU only computes.
        """
        return KNOWN_BACKENDS[backend.name].on_gpu and find_spec("triton") is not None

    def queue(self, backend: Backend, downscale: int, shape: Shape) -> BatchQueue:
        """The queue of a GPU for batches of a shape, of every GPU in turn; for backends that have one."""
        from cellseg_batch.engine.inference.backends import cuda
        from cellseg_batch.engine.inference.gpu_batch_queue import BatchQueue

        with self.models_lock:
            key = (backend, shape)
            if key not in self._queues:
                queues = []
                for gpu in self._gpus:
                    there = self.backend(backend.name, backend.precision, downscale, gpu)
                    queues.append(BatchQueue(cuda.Device(gpu), partial(_compile_batch, there, shape), shape[0]))
                self._queues[key] = cycle(queues)
            self._queues.move_to_end(key)
            while len(self._queues) > _KEPT_QUEUES:
                self._queues.popitem(last=False)
            return next(self._queues[key])

    def _make_room(self, shape: Shape) -> None:
        """Let go of the idle networks that were not used for longest: each holds memory of its own."""
        areas = {key: math.prod(key[1]) // key[1][1] for key in self._sessions}
        room = _KEPT_AREA - math.prod(shape) // shape[1]
        for key in areas:
            if not self._sessions[key].users and sum(areas[kept] for kept in self._sessions) > room:
                del self._sessions[key]


class _Sessions:
    """The sessions on one network, each for one thread at a time.

    Attributes:
        users: threads that have one or wait for one.
    """

    def __init__(self, network: Network, run_lock: AbstractContextManager[Any]) -> None:
        self.users = 0
        self._lock = threading.Lock()
        self._idle: SimpleQueue[Session] = SimpleQueue()
        for _ in range(_SESSIONS):
            self._idle.put(Session(network, run_lock))

    def enter(self) -> AbstractContextManager[Session]:
        """Count as a user from now on; the context waits for a session and gives it back."""
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
    """The model for batches of another size on a GPU, whose backends all compile models of that kind."""
    return cast("DeviceModel", backend.compile((batch, *shape[1:])))
