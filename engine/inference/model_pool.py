"""The backends and compiled models of a process: made once, kept, run one at a time, their time counted."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import DTypeLike

from cellseg_batch.engine.inference.backends.protocol import Backend, DeviceModel, Shape
from cellseg_batch.engine.inference.backends.registry import KINDS, REFERENCE, candidates, make_backend
from cellseg_batch.engine.inference.race import load_or_race, request_of
from cellseg_batch.engine.inference.race_result import RaceResult
from cellseg_batch.engine.inference.session import Feed
from cellseg_batch.engine.machine import bound_heaps, cores
from cellseg_batch.engine.models import load_model, shipped_models
from cellseg_batch.engine.settings import RACE_TILE, Settings, gpus_of
from cellseg_batch.engine.storage.cache import Artefacts
from cellseg_batch.trainer.bundle import Bundle

if TYPE_CHECKING:
    from cellseg_batch.engine.inference.gpu_batch_queue import BatchQueue

_MOST_PROBES = 4
# Compiled models are kept while their batches are no larger together than this, in px: two large tiles, or the many
# shapes of a folder of small images.
_KEPT_AREA = 2 * RACE_TILE**2

# Tile sizes whose models stay on a GPU: of a slide, and of the next one that is being prepared.
_KEPT_QUEUES = 2

# What a model is compiled for.
_Key = tuple[Backend, Shape, np.dtype[Any]]


@dataclass(frozen=True)
class Choice:
    """The backend of every slide that was not begun with another one.

    Attributes:
        backend, precision: its name.
        race_result: the race that it won; None if there was nothing to choose.
    """

    backend: str
    precision: str
    race_result: RaceResult | None


def choose(settings: Settings, bundle: Bundle, racing: Callable[[], None] = lambda: None) -> Choice:
    """The fastest backend that does what was asked and passes the gate.

    Args:
        settings: say which model, backend, precision and threads.
        bundle: the model.
        racing: called if no race of this model is known on this machine yet, before it is run.

    Raises:
        BackendError: no backend can do what was asked.
    """
    fitting = candidates(settings.backend, settings.precision, settings.device)
    if fitting == [REFERENCE] or (len(fitting) == 1 and not settings.gate):
        return Choice(*fitting[0], None)  # nothing to compare with anything
    race_result = load_or_race(request_of(settings), bundle, Artefacts(), racing)
    best = race_result.pick(settings.backend, settings.precision, settings.gate)
    return Choice(best.backend, best.precision, race_result)


def choose_backend(settings: Settings) -> Choice:
    """`choose`, as a task for a worker process."""
    return choose(settings, load_model(settings.model))


def settings_elsewhere(settings: Settings) -> Settings:
    """The settings as a worker process needs them: no path depends on its folder, and workers share the cores here."""
    model = settings.model if settings.model in shipped_models() else str(Path(settings.model).resolve())
    if settings.scheduler != "processes":
        return replace(settings, model=model)
    threads = settings.threads or max(1, cores() // settings.workers)
    device = "cuda" if settings.device.startswith("cuda") else settings.device  # each process sees one only
    return replace(settings, model=model, threads=threads, device=device)


class ModelPool:
    """Makes and keeps what the slides of a run share in one process.

    Args:
        bundle: the model.
        settings: say which model, backend, precision and threads.
        racing: called if no race of this model is known on this machine yet, before it is run.
        choice: of the backend, if that is settled already.

    Attributes:
        choice: which backend is to be used.
        chosen: that backend.
        seconds: spent on choosing, compiling and warming up.
        turn: held by the thread that makes or looks for a model.

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
        bound_heaps()
        self.bundle = bundle
        # What a mask does not need costs a twentieth of the time, and twice its size in memory.
        self._network = bundle if settings.instances or settings.objects else bundle.foreground
        self.seconds = 0.0
        self.turn = threading.RLock()
        self._running = threading.RLock()
        self._gpus = gpus_of(settings.device)
        self._artefacts = Artefacts()
        with self.counted():
            self.choice = choice or choose(settings, bundle, racing)
            self._threads = settings.threads or cores()
            winner = self.choice.backend, self.choice.precision
            self.chosen = make_backend(self._network, *winner, self._threads, self._artefacts, self._gpus[0])
        self._backends = {(self.chosen.name, self.chosen.precision, 1, self._gpus[0]): self.chosen}
        self._queues: OrderedDict[tuple[Backend, Shape], Iterator[BatchQueue]] = OrderedDict()
        self._feeds: dict[_Key, _Feeds] = {}
        self._probes: dict[_Key, Feed] = {}

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
        with self.turn:
            if key not in self._backends:
                with self.counted():
                    network = self._network.shrunk(downscale)
                    how = name, precision, self._threads, self._artefacts
                    self._backends[key] = make_backend(network, *how, key[-1])
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
    def feed(self, backend: Backend, shape: Shape, dtype: DTypeLike) -> Iterator[Feed]:
        """The model compiled for a batch shape and a type of pixels, fed by this thread alone while the context lasts.

        Where there can be twins two threads have one each: one cuts or stitches its tiles while the other's run.
        """
        with self.turn:
            key = (backend, shape, np.dtype(dtype))
            feeds = self._feeds.pop(key, None)
            if feeds is None:
                self._make_room(shape)
                with self.counted():
                    feeds = _Feeds(Feed(backend, shape, dtype, self._running))
            self._feeds[key] = feeds  # the last one used comes last
            users = feeds.enter()
        with users as feed:
            yield feed

    def queue(self, backend: Backend, downscale: int, shape: Shape) -> BatchQueue | None:
        """The queue of a GPU for batches of a shape, of every GPU in turn; None for what does not run on GPUs.

        Without Triton there is none either: the host cuts and stitches then, and the GPU only computes.
        """
        if not KINDS[backend.name].on_gpu or find_spec("triton") is None:
            return None
        from cellseg_batch.engine.inference.backends import cuda
        from cellseg_batch.engine.inference.gpu_batch_queue import BatchQueue

        with self.turn:
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
        """Let go of the idle models that were not used for longest: each holds memory of its own."""
        areas = {key: math.prod(key[1]) // key[1][1] for key in self._feeds}
        room = _KEPT_AREA - math.prod(shape) // shape[1]
        for key in areas:
            if not self._feeds[key].users and sum(areas[one] for one in self._feeds) > room:
                del self._feeds[key]

    def drop_probes(self) -> None:
        """Give back what `probe` has made."""
        with self.turn:
            self._probes.clear()

    def probe(self, backend: Backend, shape: Shape, dtype: DTypeLike) -> Feed:
        """The model compiled for windows that show how large nuclei are: small, so a few are kept.

        To be asked for and used while ``turn`` is held.
        """
        key = (backend, shape, np.dtype(dtype))
        if key not in self._probes:
            if len(self._probes) >= _MOST_PROBES:
                self._probes.clear()
            with self.counted():
                self._probes[key] = Feed(backend, shape, dtype, self._running)
        return self._probes[key]


class _Feeds:
    """A model and its twin, if it has one, each for one thread at a time.

    Attributes:
        users: threads that have one or wait for one.
    """

    def __init__(self, feed: Feed) -> None:
        self.users = 0
        self._lock = threading.Lock()
        self._idle: SimpleQueue[Feed] = SimpleQueue()
        for one in filter(None, (feed, feed.twin())):
            self._idle.put(one)

    def enter(self) -> AbstractContextManager[Feed]:
        """Count as a user from now on; the context waits for a feed and gives it back."""
        with self._lock:
            self.users += 1
        return self._use()

    @contextmanager
    def _use(self) -> Iterator[Feed]:
        feed = self._idle.get()
        try:
            yield feed
        finally:
            self._idle.put(feed)
            with self._lock:
                self.users -= 1


def _compile_batch(backend: Backend, shape: Shape, batch: int) -> DeviceModel:
    """The model for batches of another size on a GPU, whose backends all compile models of that kind."""
    return cast("DeviceModel", backend.compile((batch, *shape[1:])))
