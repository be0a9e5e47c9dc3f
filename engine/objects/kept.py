"""Give the objects that are kept the ids 1, 2, ... in the order that they had among all objects.

Until labels are written the others have ids too, above those that are kept, as they take part in growth.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cellseg_batch.engine.storage.atomic_files import whole_file
from cellseg_batch.engine.storage.paths import RemotePath
from cellseg_batch.kernels.instances import INNER


@dataclass(frozen=True)
class KeptIds:
    """The ids of all objects of a slide, those that are kept first.

    Attributes:
        count: number of objects that are kept, and the highest of their ids.
        order: (objects + 1,) the id of each object, by its id among all; 0 stays 0.
    """

    count: int
    order: NDArray[Any]

    def codes_of(self, codes: NDArray[Any]) -> NDArray[Any]:
        """The numbered codes for these ids; codes are those for the ids among all objects."""
        is_id = codes > INNER
        codes[is_id] = self.order[codes[is_id] - INNER] + INNER
        return codes

    def save(self, folder: Path) -> None:
        """Write the ids to ``folder``.

        Raises:
            OutputError: a file cannot be written.
        """
        for name, values in (("kept", np.array(self.count)), ("order", self.order)):
            with whole_file(folder / f"{name}.npy") as stream:
                np.save(stream, values)

    @classmethod
    def load(cls, folder: Path) -> KeptIds:
        """Open the files of `save`: memory-mapped from a local disk, read from an object store."""
        count, order = folder / "kept.npy", folder / "order.npy"
        is_remote = isinstance(folder, RemotePath)
        ids = np.load(BytesIO(order.read_bytes())) if is_remote else np.load(order, mmap_mode="r")
        return cls(int(np.load(BytesIO(count.read_bytes()))), ids)


def keep(is_kept: NDArray[np.bool_], dtype: DTypeLike) -> KeptIds:
    """Number the objects.

    Args:
        is_kept: (objects,) whether each object is kept, by its id among all less 1.
        dtype: type of ids.
    """
    order = np.zeros(len(is_kept) + 1, dtype)
    count = int(np.count_nonzero(is_kept))
    order[1:][is_kept] = np.arange(1, count + 1)
    order[1:][~is_kept] = np.arange(count + 1, len(is_kept) + 1)
    return KeptIds(count, order)
