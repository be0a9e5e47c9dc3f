"""Make, keep and share the backends and compiled networks of a process; one network runs at a time."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property, partial
from itertools import cycle
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import DTypeLike

from cellseg_batch.engine.backend_table import KNOWN_BACKENDS
from cellseg_batch.engine.inference.backends.protocol import Backend, DeviceModel, Shape
from cellseg_batch.engine.inference.backends.registry import REFERENCES, make_backend
from cellseg_batch.engine.inference.choice import Choice, choose
from cellseg_batch.engine.inference.decoders import DECODERS
from cellseg_batch.engine.inference.gpu_admission import Admission
from cellseg_batch.engine.inference.kept_by_use import KeptByUse
from cellseg_batch.engine.inference.probes import Probes
from cellseg_batch.engine.inference.session import Network, Session, compile_network
from cellseg_batch.engine.machine import cores
from cellseg_batch.engine.settings import TILE, Settings, gpus_of
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle

if TYPE_CHECKING:
    from cellseg_batch.engine.inference.gpu_batch_queue import BatchQueue

_log = logging.getLogger(__name__)

# Idle networks are kept while the area of all batches is at most this, in px: two large tiles on CPUs, or the many
# shapes of a folder of small images.  A GPU that runs out of memory drops them before it makes smaller batches.
_KEPT_AREA = 2 * TILE**2
_KEPT_AREA_ON_GPU = 8 * TILE**2

# Sessions per network: one thread cuts or stitches its tiles while another thread's tiles run.
_SESSIONS = 2

# (backend, batch shape, pixel dtype) that a network is compiled for.
_Key = tuple[Backend, Shape, np.dtype[Any]]


class ModelPool:
    """Makes and keeps the models that the slides of a run share in one process.

    Args:
        bundle: the model.
        settings: settings with model, backend, precision and threads.
        racing: called before a race is run, which happens if this machine has no result for this model.
        choice: choice of the backend, if it was made already.
        pixels: number of pixels that there are to segment, as `choose` takes it.
        compiling: called before a network is converted or compiled for the first time on this machine, in any thread.

    Attributes:
        compiling: as given, for kernels too.
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
        pixels: float = math.inf,
        compiling: Callable[[], None] = lambda: None,
    ) -> None:
        self.bundle, self.compiling = bundle, compiling
        # Outputs that a mask does not need take a twentieth of the time and twice the foreground's memory.
        self._network = DECODERS[bundle.card.decoder].network(bundle, instances=settings.makes_ids)
        self.seconds = 0.0
        self.models_lock = threading.RLock()
        self._compile_lock, self._run_lock = threading.Lock(), threading.RLock()
        self._gpus = gpus_of(settings.device)
        self._admissions = {gpu: Admission() for gpu in self._gpus}
        self._artefacts = Artefacts(making=compiling)
        with self.counted():
            self.choice = choice or choose(settings, bundle, racing, pixels)
            self._threads = settings.threads or cores()
            winner = self.choice.backend, self.choice.precision
            self.chosen = make_backend(self._network, *winner, self._threads, self._artefacts, self._gpus[0])
        self._backends = {(self.chosen.name, self.chosen.precision, 1, self._gpus[0]): self.chosen}
        self._queues: KeptByUse[tuple[Backend, Shape], Iterator[BatchQueue]] = KeptByUse(_KEPT_AREA_ON_GPU)
        self._sessions: KeptByUse[_Key, _Sessions] = KeptByUse(_KEPT_AREA)
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

    def prober(self, factor: int) -> Backend:
        """Return the backend for the windows of `probes`, downscaled by ``factor``; they are worth no long compile."""
        name, weights = self.chosen.name, self.bundle.card.format
        eager = KNOWN_BACKENDS[name].eager
        if eager and weights not in KNOWN_BACKENDS[eager].formats:
            return self.backend(*REFERENCES[weights], factor)
        return self.backend(eager or name, self.chosen.precision, factor)

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

        Each network has two sessions; a third thread waits.  The first session of a network compiles it, so that other
        threads look up theirs meanwhile.
        """
        with self._in_use(backend, shape, dtype) as sessions, sessions.session() as session:
            yield session

    @contextmanager
    def in_use(self, backend: Backend, shape: Shape, dtype: DTypeLike) -> Iterator[None]:
        """Keep the network of a session for as long as the context lasts, and lend none of its sessions."""
        with self._in_use(backend, shape, dtype):
            yield

    @contextmanager
    def _in_use(self, backend: Backend, shape: Shape, dtype: DTypeLike) -> Iterator[_Sessions]:
        def compile_model() -> Network:
            with self.counted():
                return compile_network(backend, shape, dtype)

        def make() -> _Sessions:
            return _Sessions(compile_model, self._compile_lock, self._run_lock)

        with ExitStack() as lent:
            with self.models_lock:
                key = (backend, shape, np.dtype(dtype))
                sessions = lent.enter_context(self._sessions.lend(key, _area(shape), make))
            yield sessions

    def drop_idle(self) -> None:
        """Free the host memory of networks that are not in use; they are compiled again when they are asked for."""
        self._sessions.drop_idle()
        self.probes.clear()

    def keep_one(self) -> None:
        """Keep no network without users beside the one that was used last, from now on, and no probe as of now."""
        self._sessions.keep_last()
        self.probes.clear()

    def has_queue(self, backend: Backend) -> bool:
        """Whether the GPU gathers and stitches whole blocks through `queue`.

        If the kernels cannot run there, the host gathers and stitches, and the GPU only runs the network.
        """
        return KNOWN_BACKENDS[backend.name].on_gpu and self._kernels_run

    @cached_property
    def _kernels_run(self) -> bool:
        from cellseg_batch.engine.inference.gpu_probe import why_no_kernels

        reason = why_no_kernels(self._gpus[0])
        if reason:
            _log.warning("the processor cuts and stitches the tiles of GPUs, which is slower: %s", reason)
        return not reason

    @contextmanager
    def queue(self, backend: Backend, downscale: int, shape: Shape) -> Iterator[BatchQueue]:
        """Lend a GPU's queue for batches of ``shape``, each GPU in turn; only for backends with `has_queue`.

        The network behind it is compiled by the first batch, so that other threads look up theirs meanwhile.
        """
        with ExitStack() as lent:
            with self.models_lock:
                make = partial(self._make_queues, backend, downscale, shape)
                queue = next(lent.enter_context(self._queues.lend((backend, shape), _area(shape), make)))
            yield queue

    def _make_queues(self, backend: Backend, downscale: int, shape: Shape) -> Iterator[BatchQueue]:
        """Return the queues of every GPU for batches of ``shape``, over and over again."""
        from cellseg_batch.engine.inference.backends import cuda
        from cellseg_batch.engine.inference.gpu_batch_queue import BatchQueue

        queues = []
        for gpu in self._gpus:
            compile_model = partial(
                _compile_batch, self.backend(backend.name, backend.precision, downscale, gpu), shape
            )
            device, admission = cuda.Device(gpu), self._admissions[gpu]
            queues.append(BatchQueue(device, compile_model, shape[0], admission, self._queues.drop_idle))
        return cycle(queues)


class _Sessions:
    """The sessions of one network, each for one thread at a time.

    Args:
        compile_model: compiles the network.
        compile_lock: lock held meanwhile, shared by all networks: compiling two at once takes the memory of both.
        run_lock: lock held while a network runs.
    """

    def __init__(
        self,
        compile_model: Callable[[], Network],
        compile_lock: AbstractContextManager[Any],
        run_lock: AbstractContextManager[Any],
    ) -> None:
        self._compile, self._compile_lock, self._run_lock = compile_model, compile_lock, run_lock
        self._compiled = False
        self._idle: SimpleQueue[Session] = SimpleQueue()

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Wait for a session and lend it."""
        if not self._compiled:
            with self._compile_lock:
                if not self._compiled:  # another thread may have done it meanwhile
                    network = self._compile()
                    for _ in range(_SESSIONS):
                        self._idle.put(Session(network, self._run_lock))
                    self._compiled = True
        session = self._idle.get()
        try:
            yield session
        finally:
            self._idle.put(session)


def _area(shape: Shape) -> int:
    """Area in px of all tiles of a batch."""
    return math.prod(shape) // shape[1]


def _compile_batch(backend: Backend, shape: Shape, batch: int) -> DeviceModel:
    """Compile the model for batches of ``batch`` tiles; all GPU backends compile to a `DeviceModel`."""
    return cast("DeviceModel", backend.compile((batch, *shape[1:])))
