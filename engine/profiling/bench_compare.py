"""Compare two results of ``cellseg-batch bench``: is the second slower than the first by more than noise explains?

A bootstrap over the rounds gives the interval of the ratio of two medians.  A virtual machine as a whole may be slower
today than yesterday.  So if both results have a yardstick of the machine's speed, a row counts as slower only if it is
slower both with and without its rates being divided by the yardstick.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_batch.engine.errors import UsageError

_TOLERANCE = 0.1
"""Share by which two runs of the same code may differ even if the rounds of each run agree."""

_DRAWS = 4000
_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Ratio:
    """Ratio of the second result's rate to the first's.

    Attributes:
        median: ratio of the medians; below 1, the second is slower.
        low, high: 95 % interval of the ratio.
    """

    median: float
    low: float
    high: float

    @property
    def slower(self) -> bool:
        """Whether the second is slower by more than the tolerance, and its whole interval lies below 1."""
        return self.median < 1 - _TOLERANCE and self.high < 1


@dataclass(frozen=True)
class Comparison:
    """Comparison of a row that both results have.

    Attributes:
        name: name of the row.
        first, second: medians of the two results in Mpx/s.
        plain: ratio of the rates.
        scaled: ratio of the rates, each divided by the speed of its machine; None without a yardstick.
    """

    name: str
    first: float
    second: float
    plain: Ratio
    scaled: Ratio | None

    @property
    def regressed(self) -> bool:
        """Whether the second is slower by more than noise explains."""
        return self.plain.slower and (self.scaled is None or self.scaled.slower)


def load_result(path: Path) -> dict[str, Any]:
    """Read a result that ``bench`` or a benchmark wrote.

    Raises:
        UsageError: the file cannot be read, or is no such result.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        for row in content["rows"]:
            if not row["name"] or not all(rate > 0 for rate in row["rounds"]) or not row["rounds"]:
                raise ValueError(f"row {row['name']!r} has no rounds above 0")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            str(path),
            expected="a result of cellseg-batch bench",
            found=f"{type(error).__name__}: {error}",
            remedy="write one with cellseg-batch bench --out FILE",
        ) from error
    return content


def compare_results(first: dict[str, Any], second: dict[str, Any]) -> list[Comparison]:
    """Compare every row that both results have.

    Raises:
        UsageError: the results have no row in common.
    """
    later = {row["name"]: row for row in second["rows"]}
    both = [(row, later[row["name"]]) for row in first["rows"] if row["name"] in later]
    if not both:
        raise UsageError("bench compare", expected="rows of one name", found="none", remedy="compare like with like")
    return [_compare(old, new, first.get("yardstick"), second.get("yardstick")) for old, new in both]


def _compare(
    old: dict[str, Any], new: dict[str, Any], old_speed: list[float] | None, new_speed: list[float] | None
) -> Comparison:
    before, after = np.array(old["rounds"]), np.array(new["rounds"])
    scaled = None
    if old_speed and new_speed:
        scaled = _ratio(before / np.array(old_speed), after / np.array(new_speed))
    return Comparison(old["name"], float(np.median(before)), float(np.median(after)), _ratio(before, after), scaled)


def _ratio(before: NDArray[np.float64], after: NDArray[np.float64]) -> Ratio:
    """Ratio of two medians with its interval by percentile bootstrap (Efron 1979); the seed of the draws is fixed."""
    rng = np.random.default_rng(0)
    drawn = [np.median(rng.choice(rates, (_DRAWS, len(rates))), axis=1) for rates in (before, after)]
    low, high = np.percentile(drawn[1] / drawn[0], _INTERVAL)
    return Ratio(float(np.median(after) / np.median(before)), float(low), float(high))
