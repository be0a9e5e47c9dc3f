"""Open pools of workers: threads or processes of this machine, any dask cluster, jobs of a batch queue.

Every pool implements `scheduler.Pool`.  This module must not know what a task does.  dask is imported only for a
cluster.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cellseg_batch.engine.backend_table import KNOWN_BACKENDS
from cellseg_batch.engine.errors import ClusterError, UsageError
from cellseg_batch.engine.machine import GPU_SHARE, cores, visible_gpus
from cellseg_batch.engine.scheduling.process_keeper import Processes
from cellseg_batch.engine.scheduling.scheduler import Pool, ThreadPool
from cellseg_batch.engine.scheduling.signals import SIGNALS
from cellseg_batch.engine.settings import QUEUES, ClusterSettings, Settings, gpus_of

if TYPE_CHECKING:
    from distributed import Client

# One block is computed while another is read or written; a GPU is faster than a core that reads and writes for it.
THREADS_PER_PROCESS = 2
# More blocks of a GPU at a time would take memory and wait for it.
_MOST_THREADS = 32
# In a process one thread runs Python at a time, so a GPU with many cores is fed by several; each holds a CUDA context
# and networks.  Estimates, not measured yet.
_CORES_PER_PROCESS = 8
_MOST_PROCESSES_PER_GPU = 4
# The rest of a shared GPU's memory is for the contexts.
_SHARED_MEMORY = 0.9
_CONNECT_SECONDS = 30
_COUNT_SECONDS = 5
_END_SECONDS = 5.0
_GPU = "GPU"
_JOBQUEUE_CLASSES = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "lsf": "LSFCluster"}
# dask does not repeat a task whose worker died: the run decides what to do with it.
_QUIET = {"silence_logs": logging.ERROR}
_SCHEDULER = {"allowed_failures": 0, "dashboard": False}


def open_pool(settings: Settings, imports: Sequence[str] = ()) -> Pool:
    """Open the pool that the setting ``scheduler`` names.

    Args:
        settings: settings of the run.
        imports: modules that every call needs.

    Raises:
        UsageError: the pool cannot be opened.
    """
    if settings.scheduler == "threads":
        return ThreadPool(settings.workers)
    threads = threads_per_process(settings)
    if settings.scheduler == "processes":
        return _open_processes(_devices(settings), settings.workers, threads, imports)
    if settings.scheduler in QUEUES:
        return _open_queue(settings.scheduler, settings.workers, threads, settings.cluster)
    return _connect(settings.scheduler)


def threads_per_process(settings: Settings) -> int:
    """Number of threads of each worker process that a pool starts.

    A process with a GPU gets its share of the cores, or else it would wait for what reads and writes.
    """
    share = 0
    if settings.scheduler == "processes" and (devices := _devices(settings)):
        share = cores() // (len(devices) * _processes_per_gpu(len(devices)))
    elif settings.scheduler in QUEUES and settings.cluster.gres is not None:
        share = settings.cluster.cores or 0
    return max(THREADS_PER_PROCESS, min(share, _MOST_THREADS))


def _processes_per_gpu(gpus: int) -> int:
    """Number of processes of this machine that share each of its GPUs."""
    return max(1, min(cores() // (gpus * _CORES_PER_PROCESS), _MOST_PROCESSES_PER_GPU))


def _devices(settings: Settings) -> list[str]:
    """The GPUs that get processes of their own, as ``CUDA_VISIBLE_DEVICES`` names them."""
    backend = KNOWN_BACKENDS.get(settings.backend)  # None: auto
    if settings.device == "cpu" or (backend is not None and not backend.on_gpu):
        return []
    asked = gpus_of(settings.device) if ":" in settings.device else None
    return [name for number, name in enumerate(visible_gpus()) if asked is None or f"cuda:{number}" in asked]


class DaskPool:
    """The workers of a dask cluster.

    Args:
        client: client that is connected to the cluster.
        close: releases the cluster; its argument says whether there is time to let workers end.
        gpus: whether each call needs a GPU.
        most: number of calls at a time that the cluster may grow to; None counts the present threads.
    """

    # A call costs the scheduler and the worker about 7 ms.
    seconds_per_call = 0.5

    def __init__(self, client: Client, close: Callable[[bool], None], gpus: bool, most: int | None = None) -> None:
        self._client = client
        self._close = close
        self._most = most
        self._counted = 0.0
        self._threads = 1
        self._executor = client.get_executor(pure=False, **({"resources": {_GPU: 1}} if gpus else {}))
        self._lock = threading.Lock()
        self._failure: ClusterError | None = None

    @property
    def workers(self) -> int:
        """Number of calls that run at a time."""
        if self._most is not None:
            return self._most
        if time.monotonic() - self._counted > _COUNT_SECONDS:
            self._threads = max(1, sum(self._client.nthreads().values()))
            self._counted = time.monotonic()
        return self._threads

    @property
    def window(self) -> int:
        """Number of calls to hand out at a time."""
        return 2 * self.workers

    def submit(self, call: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Have a worker make the call.

        Raises:
            ClusterError: the pool has failed.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            future: Future[Any] = self._executor.submit(call, *arguments)
            return future

    def fail(self, failure: ClusterError) -> None:
        """Cancel the calls that wait for a worker and refuse new ones, because there will be no worker any more."""
        with self._lock:
            self._failure = failure
            self._executor.shutdown(wait=False)

    def close(self, wait: bool) -> None:
        """Release the workers; those of a cluster that the run did not start stay."""
        with suppress(Exception):  # the cluster may have ended already
            self._client.close(timeout=_CONNECT_SECONDS if wait else 1)
        with suppress(Exception):
            self._close(wait)


@dataclass(frozen=True)
class _WorkerSlot:
    """A worker process of this machine.

    Attributes:
        address: address of its dask scheduler.
        device: the GPU that it sees, as ``CUDA_VISIBLE_DEVICES`` names it; None leaves that variable as it is.
        gpu_share: share of the GPU's memory that is its own.
        threads: number of its threads.
    """

    address: str
    device: str | None
    gpu_share: float
    threads: int


def _open_processes(devices: list[str], workers: int, threads: int, imports: Sequence[str]) -> Pool:
    """Start processes for each of ``devices``, which see only their own GPU, or ``workers`` of them without a GPU.

    All listen on loopback only.

    dask's own supervisor of processes is not used: it gives up a worker that has not restarted 15 s after its death.
    """
    from distributed import Client, Scheduler, SpecCluster

    with _signals_left_to_the_run():
        scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", **_SCHEDULER}}
        cluster = SpecCluster(workers={}, scheduler=scheduler, **_QUIET)
        slots = _worker_slots(cluster.scheduler_address, devices, workers, threads)

        def close(wait: bool) -> None:
            cluster.close()  # this also ends the workers
            processes.close(_END_SECONDS if wait else 0.0)

        pool = DaskPool(Client(cluster), close, gpus=any(devices), most=threads * len(slots))
        processes = Processes(_serve, slots, ("distributed", *imports), lambda reason: pool.fail(_no_process(reason)))
    return pool


def _worker_slots(address: str, devices: list[str], workers: int, threads: int) -> list[_WorkerSlot]:
    """The processes to start; those of one GPU share its memory equally, as each sees the free memory of all."""
    if not devices:
        return [_WorkerSlot(address, None, 1.0, threads)] * workers
    count = _processes_per_gpu(len(devices))
    share = _SHARED_MEMORY / count if count > 1 else 1.0
    return [_WorkerSlot(address, device, share, threads) for _ in range(count) for device in devices]


def _serve(slot: _WorkerSlot, started: Callable[[], None]) -> None:
    """Run a dask worker until the scheduler ends."""
    import dask
    from distributed import Worker

    # The profiler samples every thread 100 times a second, which costs 6 % of the speed with small blocks.
    dask.config.set({"distributed.worker.profile.enabled": False})
    logging.getLogger("distributed").setLevel(logging.ERROR)
    options: dict[str, Any] = {"nthreads": slot.threads, "memory_limit": 0, "host": "127.0.0.1"}
    if slot.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.device
        os.environ[GPU_SHARE] = str(slot.gpu_share)
        options["resources"] = {_GPU: slot.threads}

    async def work() -> None:
        async with Worker(slot.address, dashboard=False, **options) as worker:
            started()
            await worker.finished()

    asyncio.run(work())


def _no_process(reason: str) -> ClusterError:
    return ClusterError(
        "`scheduler=processes`",
        expected="worker processes that start",
        found=reason,
        cause="too little memory, or a script without if __name__ == '__main__'",
        remedy="see what they printed, or leave `scheduler` out; finished blocks are kept",
    )


def _open_queue(queue: str, workers: int, threads: int, resources: ClusterSettings) -> Pool:
    """Open a pool of up to ``workers`` batch jobs of one process each, which start and end with the work to do."""
    try:
        import dask_jobqueue
    except ImportError as error:
        raise UsageError(
            f"`scheduler={queue}`",
            expected="dask-jobqueue",
            found="no such package",
            remedy="pip install 'cellseg-batch[hpc]'",
        ) from error
    cluster_class = getattr(dask_jobqueue, _JOBQUEUE_CLASSES[queue])
    submit = cluster_class.job_cls.submit_command
    if shutil.which(submit) is None:
        raise UsageError(
            f"`scheduler={queue}`",
            expected=f"the command {submit}",
            found="none on PATH",
            cause="a machine that submits no jobs",
            remedy="run this where jobs are submitted, such as a login node",
        )
    import dask
    from distributed import Client

    if resources.config is not None:
        configuration = dask.config.collect(paths=[str(resources.config)], env={})
        dask.config.update(dask.config.config, configuration, priority="new")
    worker_arguments = ["--nthreads", str(threads), "--memory-limit", "0", "--no-dashboard"]
    if resources.gres is not None:
        worker_arguments += ["--resources", f"{_GPU}={threads}"]
    try:
        cluster = cluster_class(
            processes=1,
            worker_extra_args=worker_arguments,
            scheduler_options=_SCHEDULER,
            **_job_options(queue, resources),
        )
    except (ValueError, OSError) as error:
        raise UsageError(
            f"`scheduler={queue}`",
            expected="what a job needs: `cores` and `memory` at least",
            found=str(error),
            remedy="add them, or a dask-jobqueue file with `config`",
        ) from error
    cluster.adapt(minimum=0, maximum=workers)
    return DaskPool(Client(cluster), lambda wait: cluster.close(), resources.gres is not None, most=threads * workers)


def _job_options(queue: str, resources: ClusterSettings) -> dict[str, Any]:
    """Options of dask-jobqueue's cluster for a job with these resources; what is None is left to its configuration."""
    hours, _, _ = (resources.walltime or "").rpartition(":")
    options: dict[str, Any] = {
        "queue": resources.queue,
        "project" if queue == "lsf" else "account": resources.account,
        # LSF counts in hours and minutes.
        "walltime": hours if queue == "lsf" and ":" in hours else resources.walltime,
        "cores": resources.cores,
        "memory": resources.memory,
    }
    if resources.gres is not None and queue == "pbs":
        # Of one chunk, which dask-jobqueue would describe by cores and memory alone.
        parts = {"ncpus": resources.cores, "mem": resources.memory}
        chunk = [f"{name}={value}" for name, value in parts.items() if value is not None]
        options["resource_spec"] = ":".join(["select=1", *chunk, resources.gres])
    elif resources.gres is not None:
        directive = f"-gpu {resources.gres}" if queue == "lsf" else f"--gres={resources.gres}"
        options["job_extra_directives"] = [directive]
    return {name: value for name, value in options.items() if value is not None}


def _connect(address: str) -> Pool:
    """Connect to the running dask scheduler at ``address``.

    Raises:
        UsageError: it does not answer.
    """
    from distributed import Client

    try:
        client = Client(address, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"`scheduler={address}`",
            expected="the address of a running dask scheduler, such as tcp://host:8786",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            remedy="start one with dask scheduler, and workers with dask worker",
        ) from error
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return DaskPool(client, lambda wait: None, any(worker["resources"].get(_GPU) for worker in workers))


@contextmanager
def _signals_left_to_the_run() -> Iterator[None]:
    """Block the signals that end a run in threads and processes that start inside: a terminal or SLURM sends to all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
