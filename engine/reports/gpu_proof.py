"""Keep and read what ``benchmarks/gpu.sh`` has proven of the code for GPUs on this machine, as one file in the cache.

It must not know how anything is proven.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from pathlib import Path

from cellseg_batch.engine.errors import OutputError
from cellseg_batch.engine.machine import gpu_driver, gpus, package_version
from cellseg_batch.engine.storage.cache import cache_folder
from cellseg_batch.engine.storage.records import read_record, write_record

_PACKAGES = ("cellseg-batch", "torch", "triton", "torch-tensorrt")


@dataclass(frozen=True)
class ProvenPart:
    """How a part of ``benchmarks/gpu.sh`` ended.

    Attributes:
        name: name of the part.
        status: passed, failed or left out.
        date: day on which it ended, such as 2026-11-29.
        reason: why it failed or was left out; "" if it passed.
    """

    name: str
    status: str
    date: str
    reason: str = ""

    @property
    def line(self) -> str:
        """The part in words."""
        return f"{self.name} {self.status}, {self.date}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class GpuProof:
    """What was proven on a GPU, and on which.

    Attributes:
        gpu: model of the GPU.
        driver: version of its driver.
        versions: name of each package that matters -> its version; None if it is missing.
        parts: the parts that were run, each as it ended last.
    """

    gpu: str
    driver: str
    versions: dict[str, str | None]
    parts: tuple[ProvenPart, ...] = ()

    def holds_for(self, other: GpuProof) -> bool:
        """Whether both speak of the same GPU model, driver and packages."""
        return (self.gpu, self.driver, self.versions) == (other.gpu, other.driver, other.versions)

    def passed(self, part: str) -> bool:
        """Whether a part has passed."""
        return any(known.name == part and known.status == "passed" for known in self.parts)


def keep_proof(part: ProvenPart) -> None:
    """Keep how a part ended on this machine, and what is known of the others with the same GPU, driver and packages.

    Raises:
        OutputError: the cache folder cannot be written.
    """
    proof = read_proof() or nothing_proven()
    others = (known for known in proof.parts if known.name != part.name)
    write_record(_path(), replace(proof, parts=(*others, part)), "a cache")


def read_proof() -> GpuProof | None:
    """What was proven with this machine's GPU, driver and packages; None if nothing was, or if the file is damaged."""
    try:
        proof = read_record(_path(), GpuProof)
    except OutputError:
        return None
    return proof if proof is not None and proof.holds_for(nothing_proven()) else None


def nothing_proven() -> GpuProof:
    """This machine's first GPU, its driver and the packages, of which nothing is proven."""
    return GpuProof((gpus() or [""])[0], gpu_driver(), {name: package_version(name) for name in _PACKAGES})


def today() -> str:
    """The day, as parts note it."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _path() -> Path:
    return cache_folder() / "gpu_proof.json"
