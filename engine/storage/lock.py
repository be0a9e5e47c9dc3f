"""Lock an output for one run at a time with a small file that names its owner, and take over locks of dead owners.

    <store>.cellseg/<image>/labels/<name>.lock

A lock whose process is dead is taken over: at once if it ran on this machine, else when the lock has not been renewed
for `LEASE_SECONDS`; a live owner renews it every quarter of that.  Ages are counted by the file system's own clock.  In
an object store, locks are made, renewed and taken over by conditional requests (If-None-Match, If-Match).
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from cellseg_batch.engine.errors import OutputError, writing_to
from cellseg_batch.engine.storage.atomic_files import PARTIAL_SUFFIX
from cellseg_batch.engine.storage.object_stores import StoreError
from cellseg_batch.engine.storage.paths import RemotePath, Version

LEASE_SECONDS = 120.0
LOCK_SUFFIX = ".lock"
# Seconds between two attempts to take a lock that another run holds.
_PAUSE = 0.2


class BusyError(OutputError):
    """Another run is at work on an output."""


class Locks:
    """The locks that one run holds; a thread renews them until `close`.

    Args:
        lease: seconds without renewal after which a lock of another machine counts as left behind.
    """

    def __init__(self, lease: float = LEASE_SECONDS) -> None:
        self._lease = lease
        self._held: dict[Path, str] = {}
        self._ended = threading.Event()
        threading.Thread(target=self._renew, name="lock renewal", daemon=True).start()

    @contextmanager
    def hold(self, path: Path) -> Iterator[None]:
        """Hold the lock at ``path``.

        Raises:
            BusyError: another run holds it.
            OutputError: the lock cannot be written.
        """
        token = uuid4().hex
        with writing_to(path, "a journal"):
            path.parent.mkdir(parents=True, exist_ok=True)
            left_behind = None
            while not _create(path, token, left_behind):
                left_behind = self._clear_left_behind(path)
        for partial in path.parent.glob(f"{glob.escape(path.name)}.*{PARTIAL_SUFFIX}"):
            partial.unlink(missing_ok=True)  # of a run that was killed while it made its lock
        self._held[path] = token
        try:
            yield
        finally:
            del self._held[path]
            with suppress(StoreError):  # then the lock stays behind; finished work is kept all the same
                if _owner(path).get("token") == token:
                    path.unlink(missing_ok=True)

    @contextmanager
    def wait_for(self, path: Path) -> Iterator[None]:
        """Hold the lock at ``path`` as soon as no other run does.

        Raises:
            OutputError: the lock cannot be written.
        """
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self.hold(path))
                    break
                except BusyError:
                    time.sleep(_PAUSE)
            yield

    def check(self, path: Path) -> None:
        """Refuse to go on if another run has taken over the lock, for example after a long sleep of this machine.

        Raises:
            BusyError: another run has taken it over.
        """
        owner = _owner(path)
        if owner.get("token") != self._held[path]:
            raise _busy(path, owner)

    def close(self) -> None:
        """End the renewals."""
        self._ended.set()

    def _renew(self) -> None:
        while not self._ended.wait(self._lease / 4):
            for path, token in list(self._held.items()):
                with suppress(OSError):
                    _show_life(path, token)

    def _clear_left_behind(self, path: Path) -> Version | None:
        """Remove the lock of a dead run; in an object store, return the version of the lock that may be replaced.

        Raises:
            BusyError: the owner is alive, or may be.
        """
        if isinstance(path, RemotePath):
            with suppress(FileNotFoundError):  # its owner has released it meanwhile
                content, version = path.read_version()
                owner = _parsed(content)
                if not self._is_left_behind(path, owner):
                    raise _busy(path, owner)
                return version
            return None
        # One process at a time: otherwise a lock that was just made could be mistaken for the dead one seen before.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self._clear(path)
        finally:
            os.close(folder)
        return None

    def _clear(self, path: Path) -> None:
        owner = _owner(path)
        if not owner and not path.exists():
            return
        if not self._is_left_behind(path, owner):
            raise _busy(path, owner)
        # Other machines may not see this flock, so check the owner again after moving the lock aside.
        aside = path.with_name(f"{path.name}.{uuid4().hex}{PARTIAL_SUFFIX}")
        with suppress(FileNotFoundError):  # another run was quicker
            path.rename(aside)
            if _owner(aside) != owner:  # another run has made its own lock already
                with suppress(FileExistsError):
                    os.link(aside, path)
            aside.unlink()

    def _is_left_behind(self, path: Path, owner: dict[str, Any]) -> bool:
        lives = _lives(owner)
        if lives is not None:
            return not lives
        probe = path.with_name(f"{path.name}.{uuid4().hex}{PARTIAL_SUFFIX}")
        probe.touch()
        try:
            return probe.stat().st_mtime - path.stat().st_mtime > self._lease
        except FileNotFoundError:
            return False  # its owner has released it meanwhile; the next attempt finds out
        finally:
            probe.unlink(missing_ok=True)


@contextmanager
def lock_in_turn(path: Path) -> Iterator[None]:
    """Hold the lock at ``path`` for a moment, as soon as no other run does.

    Raises:
        OutputError: the lock cannot be written.
    """
    locks = Locks()
    try:
        with locks.wait_for(path):
            yield
    finally:
        locks.close()


def is_held(path: Path) -> bool:
    """Whether a run holds the lock at ``path``; changes nothing.

    A run of this machine holds it while its process lives, one of another machine while it renews the lock within its
    lease, by this machine's clock.
    """
    lives = _lives(_owner(path))
    if lives is not None:
        return lives
    try:
        return time.time() - path.stat().st_mtime < LEASE_SECONDS
    except FileNotFoundError:
        return False


def _create(path: Path, token: str, instead_of: Version | None) -> bool:
    """Make the lock, whole and only if there is none; whether it was made.

    Args:
        path: path of the lock.
        token: mark of this lock, which no other lock has.
        instead_of: version that it may replace, in an object store only; None if there must be no lock.
    """
    partial = path.with_name(f"{path.name}.{token}{PARTIAL_SUFFIX}")
    process = psutil.Process()
    owner = {
        "token": token,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": process.pid,
        "started": process.create_time(),
    }
    content = json.dumps(owner).encode()
    if isinstance(path, RemotePath):
        return path.write_if(content, instead_of)
    try:
        with open(partial, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(partial, path)
    except (FileExistsError, FileNotFoundError):  # a lock exists, or the run that just made one removed this file
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def _show_life(path: Path, token: str) -> None:
    """Renew the lock, unless another run has taken it over."""
    if not isinstance(path, RemotePath):
        if _owner(path).get("token") == token:
            os.utime(path)
        return
    content, version = path.read_version()
    owner = _parsed(content)
    if owner.get("token") == token:
        # New content gives the lock a new version, so a run that saw the old one cannot replace it.
        path.write_if(json.dumps({**owner, "renewed": time.time()}).encode(), version)


def _owner(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_bytes())
    except StoreError:
        raise
    except OSError:
        return {}


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        owner: dict[str, Any] = json.loads(content)
    except ValueError:
        return {}
    return owner


def _busy(path: Path, owner: dict[str, Any]) -> BusyError:
    return BusyError(
        str(path),
        expected="an output that no other run is at work on",
        found=f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown machine')} at it",
        remedy="it is left to that one; a dead run's lock is taken over by itself, "
        f"another machine's {LEASE_SECONDS:.0f} s after its last sign of life",
    )


def _machine() -> str:
    """Name of this machine, its present boot and this container's namespace of process numbers."""
    boot_id, pid_namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    boot = boot_id.read_text().strip() if boot_id.exists() else ""
    return f"{socket.gethostname()} {boot} {pid_namespace.readlink() if pid_namespace.exists() else ''}"


def _lives(owner: dict[str, Any]) -> bool | None:
    """Whether the process of a lock's owner lives; None if it belongs to another machine, which this one cannot see."""
    return _is_alive(int(owner["pid"]), float(owner["started"])) if owner.get("machine") == _machine() else None


def _is_alive(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return bool(abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
