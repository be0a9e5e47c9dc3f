"""Two installed versions of cellseg-batch side by side: whether they write the same bits, and which is faster.

python benchmarks/compare_versions.py same  --old OLD/bin/python --new NEW/bin/python [--slide PATH]... [--out FILE]
python benchmarks/compare_versions.py speed --old OLD/bin/python --new NEW/bin/python [--slide PATH] [--rounds 5]

Each version is a virtual environment, named by its python; ``cellseg-batch`` lies beside it and runs as a process of
its own, with caches of its own in the work folder.  Nothing of the package is imported here: numpy, zarr, pyarrow and
psutil are enough, so the python of either version will do.

    same   the demo store, every --slide and a synthetic plate of 24 wells x 4 fields, through OpenVINO in fp32, bf16
           and int8, with and without --objects.  Label arrays (all levels), tables of objects (columns, types, order of
           rows) and tables of plates are compared bit by bit; metadata and provenance are not.  Exit 1 if any differs,
           if a run fails, or if there was nothing to compare.
    speed  a slide (the first --slide, or a synthetic one of 8192 px) as bf16 and int8 masks and as bf16 objects, and a
           synthetic plate of 200 fields of 540 px as bf16 masks, all with --skip-background off.  Versions take turns,
           the first of a round last in the next; a first run of each, which does not count, compiles.  Medians of what
           the run reports, and of the process: wall and processor time, peak USS and RSS of its tree of processes,
           sampled every 50 ms.

--cases takes names or patterns of cases, such as demo-fp32 and 'plate-*'; `--list` names them.  bf16 is skipped, and
said to be, where the processor has none.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

_PRECISIONS = ("fp32", "bf16", "int8")
_REFUSED = "has no native"  # how the tool says that the processor lacks a precision
_SAMPLE_SECONDS = 0.05
_LOOK_EVERY = 5  # samples: looking for new processes reads every process of the machine
_BAND = 1024
_PATTERN = 2048
_FIGURES = ("seconds", "mpx_per_s", "wall_seconds", "cpu_seconds", "peak_uss_mb", "peak_rss_mb")
_IDENTITY = """
import hashlib, importlib.util, json, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None

digest = hashlib.sha256()
for folder in sorted(importlib.util.find_spec("cellseg_batch.engine").submodule_search_locations):
    for part in ("engine", "kernels", "trainer"):
        base = Path(folder).parent / part
        for path in sorted(base.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{part}/{path.relative_to(base)}".encode() + path.read_bytes())
names = ("cellseg-batch", "torch", "openvino", "numpy", "numba", "scipy", "scikit-image", "zarr", "zarrs", "pyarrow")
versions = {name: installed(name) for name in names}
print(json.dumps({"source": digest.hexdigest()[:12], "python": sys.version.split()[0], "versions": versions}))
"""


class RunError(Exception):
    """A run that ended with an error; ``refused`` if this processor lacks the precision."""

    def __init__(self, version: str, code: int, output: str) -> None:
        words = " ".join(output.split())
        super().__init__(f"{version}: exit {code}: {words[-500:]}")
        self.refused = _REFUSED in words


@dataclass(frozen=True)
class Version:
    """An installed version: its name here, its command line tool, its caches, what it says of itself."""

    name: str
    tool: Path
    cache: Path
    about: dict[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        """Ours without what would lead it to other code, and with caches of its own."""
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "CELLSEG_"))}
        caches = {"CELLSEG_CACHE_DIR": str(self.cache / "compiled"), "NUMBA_CACHE_DIR": str(self.cache / "numba")}
        return {**ours, **caches, "COLUMNS": "400"}


@dataclass(frozen=True)
class Case:
    """An input, and the flags that it is run with."""

    name: str
    data: Path
    flags: tuple[str, ...]


@dataclass
class Difference:
    """What two outputs were compared in, and how much of it differs."""

    arrays: int = 0
    pixels: int = 0
    tables: int = 0
    cells: int = 0
    differing_pixels: int = 0
    differing_cells: int = 0
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """In words."""
        compared = f"{self.arrays} arrays of {self.pixels} pixels, {self.tables} tables of {self.cells} cells"
        if not self.arrays:
            return "DIFFERENT: no label array was found"
        if not self.found:
            return f"identical ({compared})"
        counts = f"{self.differing_pixels} pixels and {self.differing_cells} cells differ"
        return "; ".join([f"DIFFERENT: {counts} ({compared})", *self.notes[:5]])

    @property
    def found(self) -> bool:
        """Whether anything differs, be it only a type or an array without pixels."""
        return bool(self.differing_pixels or self.differing_cells or self.notes or not self.arrays)

    def note(self, where: str) -> None:
        """Keep ``where`` it differs."""
        self.notes = (*self.notes, where)


def main() -> None:
    arguments = parse()
    if arguments.list:
        cases = same_cases if arguments.part == "same" else speed_cases
        print(*(case.name for case in cases(Path(), arguments.slide)), sep="\n")
        return
    with work_folder(arguments.work) as work:
        versions = [identify(name, getattr(arguments, name), work) for name in ("old", "new")]
        say_who(versions)
        part = same if arguments.part == "same" else speed
        rows, good = part(work, versions, arguments)
    if arguments.out:
        about = {version.name: version.about for version in versions}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"part": arguments.part, "conditions": conditions(), **about, "rows": rows}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n")
        print(arguments.out)
    sys.exit(0 if good else 1)


def parse() -> argparse.Namespace:
    """The command line."""
    usual = argparse.ArgumentParser(add_help=False)
    usual.add_argument("--old", type=Path, help="python of the old version's environment")
    usual.add_argument("--new", type=Path, help="python of the new version's environment")
    usual.add_argument("--slide", type=Path, action="append", default=[], help="a slide to run on; same: any number")
    usual.add_argument("--work", type=Path, help="keep data, caches and what differs here; default: a temporary folder")
    usual.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="only these cases")
    usual.add_argument("--out", type=Path, help="write the result as JSON")
    usual.add_argument("--list", action="store_true", help="name the cases and stop")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("same", parents=[usual], help="whether both write the same bits")
    speedy = parts.add_parser("speed", parents=[usual], help="time and memory, in turns")
    speedy.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if not arguments.list and not (arguments.old and arguments.new):
        parser.error("--old and --new are needed")
    if arguments.part == "speed" and (len(arguments.slide) > 1 or arguments.rounds < 1):
        parser.error("speed takes one --slide at most, and at least one round")
    for slide in arguments.slide:
        if not slide.exists():
            parser.error(f"{slide} is not there")
    return arguments


@contextmanager
def work_folder(chosen: Path | None) -> Iterator[Path]:
    """A folder for data, caches and outputs: the one chosen, which is kept, or a temporary one."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="cellseg-compare-") as folder:
        yield Path(folder)


def identify(name: str, python: Path, work: Path) -> Version:
    """The version that a python belongs to; its caches are named by a hash of its source."""
    python = python.absolute()  # not resolved: the python of an environment is often a link out of it
    tool = python.with_name("cellseg-batch")
    for path in (python, tool):
        if not path.exists():
            raise SystemExit(f"--{name}: {path} is not there")
    ours = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), "-c", _IDENTITY], cwd=work, env=ours, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"--{name}: {python}: {done.stderr[-500:]}")
    about = json.loads(done.stdout)
    return Version(name, tool, work / "cache" / f"{name}-{about['source']}", {**about, "tool": str(tool)})


def say_who(versions: list[Version]) -> None:
    """Print which versions are compared, and in what else their environments differ."""
    for version in versions:
        about = version.about
        print(f"{version.name}: {about['versions']['cellseg-batch']}, source {about['source']}, {version.tool}")
    old, new = (version.about for version in versions)
    if old["source"] == new["source"]:
        print("both have the same source")
    for package, there in {"python": old["python"], **old["versions"]}.items():
        here = {"python": new["python"], **new["versions"]}[package]
        if there != here and package != "cellseg-batch":
            print(f"note: {package} is {there} in old and {here} in new")
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------------- same


def same_cases(data: Path, slides: list[Path]) -> list[Case]:
    """Every input in every precision, with and without objects."""
    inputs = {"demo": data / "demo.zarr", "plate": data / "plate-24x4.zarr"}
    for slide in slides:
        name = slide.name.partition(".")[0]
        while name in inputs:
            name += "_"
        inputs[name] = slide.absolute()
    return [
        Case(f"{name}-{precision}{ending}", path, (*_engine(precision), *flags))
        for name, path in inputs.items()
        for precision in _PRECISIONS
        for ending, flags in (("", ()), ("-objects", ("--objects",)))
    ]


def same(work: Path, versions: list[Version], arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Run every case with both versions and compare; rows, and whether all are identical."""
    data = work / "data"
    cases = chosen(same_cases(data, arguments.slide), arguments.cases)
    prepare(cases, data, versions[0])
    rows: list[dict[str, Any]] = []
    for case in cases:
        start = time.perf_counter()
        outs = [work / "same" / case.name / version.name for version in versions]
        failed: list[RunError] = []
        for version, out in zip(versions, outs, strict=True):
            try:
                segment(version, case, out)
            except RunError as error:
                failed.append(error)
        found: dict[str, Any] = {}
        if failed:
            refused = len(failed) == len(versions) and all(error.refused for error in failed)
            status = "skipped" if refused else "failed"
            verdict = "skipped: this processor has no such precision" if refused else f"FAILED: {failed[0]}"
        else:
            difference = compare(*outs)
            status, verdict = "different" if difference.found else "identical", difference.verdict
            found = vars(difference)
        seconds = time.perf_counter() - start
        print(f"{case.name:28} {verdict}  [{seconds:.0f} s]", flush=True)
        rows.append({"name": case.name, "status": status, "verdict": verdict, **found})
        if status != "different":
            shutil.rmtree(outs[0].parent, ignore_errors=True)
        elif arguments.work:
            print(f"{'':28} kept in {outs[0].parent}", flush=True)
    statuses = [row["status"] for row in rows]
    print(", ".join(f"{statuses.count(one)} {one}" for one in dict.fromkeys(statuses)))
    return rows, "identical" in statuses and not {"different", "failed"} & set(statuses)


def compare(old: Path, new: Path) -> Difference:
    """Compare every label array and table below two output folders."""
    difference = Difference()
    for name, pair in _pairs(_arrays(old), _arrays(new)):
        _compare_arrays(name, pair, difference)
    for name, pair in _pairs(_tables(old), _tables(new)):
        read = _read_csv if name.endswith(".csv") else _read_parquet
        _compare_tables(name, [read(path) if path else {} for path in pair], difference)
    return difference


def _pairs(old: dict[str, Path], new: dict[str, Path]) -> Iterator[tuple[str, tuple[Path | None, Path | None]]]:
    for name in sorted(old.keys() | new.keys()):
        yield name, (old.get(name), new.get(name))


def _arrays(folder: Path) -> dict[str, Path]:
    found = (path for pattern in ("zarr.json", ".zarray") for path in folder.rglob(pattern))
    arrays = [path.parent for path in found if path.name != "zarr.json" or _node_type(path) == "array"]
    return {str(path.relative_to(folder)): path for path in arrays}


def _node_type(path: Path) -> str:
    return str(json.loads(path.read_text()).get("node_type"))


def _tables(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for end in ("parquet", "csv") for path in folder.rglob(f"*.{end}")}


def _compare_arrays(name: str, paths: tuple[Path | None, Path | None], difference: Difference) -> None:
    there = [zarr.open_array(str(path), mode="r") for path in paths if path]
    largest = max(array.size for array in there)
    difference.arrays += 1
    difference.pixels += largest
    if len(there) < 2 or there[0].shape != there[1].shape or there[0].dtype != there[1].dtype:
        difference.differing_pixels += largest
        forms = [f"{array.dtype}{array.shape}" for array in there]
        difference.note(f"{name}: {' and '.join(forms) if len(there) > 1 else 'only in one'}")
        return
    count = 0
    for place in _bands(there[0].shape):
        old, new = (np.asarray(array[place]) for array in there)
        count += int(np.count_nonzero(_bits(old) != _bits(new)))
    difference.differing_pixels += count
    if count:
        difference.note(f"{name}: {count} pixels")


def _bands(shape: tuple[int, ...]) -> Iterator[Any]:
    """Bands of rows, so that no slide is held whole."""
    if len(shape) < 2:
        yield ...
        return
    for y in range(0, shape[-2], _BAND):
        yield (..., slice(y, min(y + _BAND, shape[-2])), slice(None))


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    """Floating point values as the integers of their bits: a NaN equals itself, and -0 is not 0."""
    if values.dtype.kind != "f":
        return values
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def _read_parquet(path: Path) -> dict[str, pa.Array]:
    table = pq.read_table(path)
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        columns[name] = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return columns


def _read_csv(path: Path) -> dict[str, pa.Array]:
    """Columns of text, as they stand in the file."""
    with open(path, newline="") as stream:
        head, *rows = list(csv.reader(stream)) or [[]]
    return {
        name: pa.array([row[i] if i < len(row) else None for row in rows], pa.string()) for i, name in enumerate(head)
    }


def _compare_tables(name: str, tables: list[dict[str, pa.Array]], difference: Difference) -> None:
    old, new = tables
    difference.tables += 1
    if list(old) != list(new):
        odd = sorted(old.keys() ^ new.keys())
        difference.note(
            f"{name}: columns {', '.join(odd) or 'in another order'}" if old and new else f"{name}: only in one"
        )
    for column in dict.fromkeys([*old, *new]):
        pair = [table[column] for table in tables if column in table]
        longest, count = max(len(values) for values in pair), 0
        if len(pair) < 2 or pair[0].type != pair[1].type:
            count = longest
            if len(pair) == 2:
                difference.note(f"{name}: {column}: {pair[0].type} and {pair[1].type}")
        else:
            count = _differing(*pair)
            if count:
                difference.note(f"{name}: {column}: {count} cells")
        difference.cells += longest
        difference.differing_cells += count


def _differing(old: pa.Array, new: pa.Array) -> int:
    """Cells that differ, row by row; rows that only one has differ."""
    shared = min(len(old), len(new))
    beyond = max(len(old), len(new)) - shared
    old, new = old[:shared], new[:shared]
    nulls = [values.is_null().to_numpy(zero_copy_only=False) for values in (old, new)]
    if pa.types.is_floating(old.type):
        plain = [_bits(values.fill_null(0).to_numpy(zero_copy_only=False)) for values in (old, new)]
        unequal = plain[0] != plain[1]
    elif pa.types.is_nested(old.type):
        unequal = np.array([a != b for a, b in zip_longest(old.to_pylist(), new.to_pylist())], np.bool_)
    else:
        unequal = pc.not_equal(old, new).fill_null(False).to_numpy(zero_copy_only=False)
    one_null, both_null = nulls[0] != nulls[1], nulls[0] & nulls[1]
    return int(np.count_nonzero((unequal & ~both_null) | one_null)) + beyond


# --------------------------------------------------------------------------------------------------------- speed


def speed_cases(data: Path, slides: list[Path]) -> list[Case]:
    """The cases that are timed."""
    slide = slides[0].absolute() if slides else data / "slide-8192.zarr"
    plate = data / "plate-200.zarr"
    flags = {precision: (*_engine(precision), "--skip-background", "off") for precision in _PRECISIONS}
    return [
        Case("slide-bf16", slide, flags["bf16"]),
        Case("slide-int8", slide, flags["int8"]),
        Case("slide-bf16-objects", slide, (*flags["bf16"], "--objects")),
        Case("plate-bf16", plate, flags["bf16"]),
    ]


def speed(work: Path, versions: list[Version], arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Time every case with both versions in turns; rows, and whether any case was timed and none failed."""
    data = work / "data"
    cases = chosen(speed_cases(data, arguments.slide), arguments.cases)
    prepare(cases, data, versions[0])
    measured: dict[str, dict[str, list[dict[str, float]]]] = {}
    failures = 0
    for case in cases:
        errors = [error for version in versions if (error := _warm(version, case, work)) is not None]
        if not errors:
            measured[case.name] = {version.name: [] for version in versions}
        elif len(errors) == len(versions) and all(error.refused for error in errors):
            print(f"{case.name}: skipped: this processor has no such precision", flush=True)
        else:
            failures += 1
            print(f"{case.name}: FAILED: {errors[0]}", flush=True)
    for turn in range(arguments.rounds):
        for case in (case for case in cases if case.name in measured):
            for version in versions[:: -1 if turn % 2 else 1]:
                try:
                    figures = measure(version, case, work)
                except RunError as error:
                    raise SystemExit(f"{case.name}: {error}") from None
                measured[case.name][version.name].append(figures)
                told = f"{figures['seconds']:.2f} s, wall {figures['wall_seconds']:.2f} s"
                print(f"round {turn + 1}: {case.name} {version.name} {told}", flush=True)
    rows = [summarise(name, rounds) for name, rounds in measured.items()]
    print_table(rows)
    return rows, bool(rows) and not failures


def _warm(version: Version, case: Case, work: Path) -> RunError | None:
    """A run that does not count: it races, compiles and fills the system's cache of files."""
    try:
        figures = measure(version, case, work)
    except RunError as error:
        return error
    print(f"warm: {case.name} {version.name} wall {figures['wall_seconds']:.1f} s", flush=True)
    return None


def measure(version: Version, case: Case, work: Path) -> dict[str, float]:
    """The figures of one run, whose output is removed."""
    out = work / "speed" / f"{case.name}-{version.name}"
    figures = segment(version, case, out, watch=True)
    shutil.rmtree(out)
    return figures


def summarise(name: str, rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """A row: medians, ratios of medians, and how far the rounds lie apart."""
    figures: dict[str, Any] = {}
    for figure in _FIGURES:
        old, new = ([one[figure] for one in rounds[version]] for version in ("old", "new"))
        ratios = [after / before for before, after in zip(old, new, strict=True)]
        figures[figure] = {
            "old": median(old),
            "new": median(new),
            "ratio": median(new) / median(old),
            "old_spread": _spread(old),
            "new_spread": _spread(new),
            "lowest_ratio": min(ratios),
            "highest_ratio": max(ratios),
        }
    return {"name": name, "figures": figures, "rounds": rounds}


def _spread(values: list[float]) -> float:
    """From the least to the greatest, as a share of the median."""
    return (max(values) - min(values)) / median(values)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Medians with their spread, and the ratio new/old with the least and greatest of a round."""
    if rows:
        print(
            f"{'case':20} {'median of':13} {'old':>9} {'spread':>7} {'new':>9} {'spread':>7} {'new/old':>8}  of rounds"
        )
    for row in rows:
        for figure, of in row["figures"].items():
            sides = " ".join(f"{of[side]:9.2f} {100 * of[side + '_spread']:5.1f} %" for side in ("old", "new"))
            within = f"{of['lowest_ratio']:.3f}-{of['highest_ratio']:.3f}"
            print(f"{row['name']:20} {figure:13} {sides} {of['ratio']:8.3f}  {within}")


# ---------------------------------------------------------------------------------------------------------- runs


def _engine(precision: str) -> tuple[str, ...]:
    return ("--backend", "openvino", "--precision", precision)


def chosen(cases: list[Case], patterns: list[str]) -> list[Case]:
    """The cases that a name or pattern takes; one that takes none is an error."""
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise SystemExit(f"--cases {pattern}: there are {', '.join(case.name for case in cases)}")
    return [case for case in cases if any(fnmatchcase(case.name, pattern) for pattern in patterns)]


def segment(version: Version, case: Case, out: Path, watch: bool = False) -> dict[str, float]:
    """Run a case to its end into ``out``, which is emptied first; its figures, with peaks of memory if ``watch``."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    report, log = out.with_suffix(".json"), out.with_suffix(".log")
    report.unlink(missing_ok=True)
    command = [str(version.tool), "run", str(case.data), "--output", str(out), "--json", str(report), "--quiet"]
    with open(log, "w") as stream:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        process = subprocess.Popen(
            [*command, *case.flags], stdout=stream, stderr=subprocess.STDOUT, cwd=out.parent, env=version.environment
        )
        with Peaks(process.pid, watch) as peaks:
            code = process.wait()
            wall = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        raise RunError(version.name, code, log.read_text(errors="replace"))
    told = json.loads(report.read_text())
    if told["status"] != "done":
        raise RunError(version.name, code, f"status {told['status']}")
    return {
        "seconds": told["seconds"],
        "mpx_per_s": told["mpx_per_s"],
        "compile_seconds": told["compile_seconds"],
        "wall_seconds": wall,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_uss_mb": peaks.uss / 1e6,
        "peak_rss_mb": peaks.rss / 1e6,
    }


class Peaks:
    """Samples the memory of a process and its descendants from outside while it is open."""

    def __init__(self, pid: int, wanted: bool) -> None:
        self.uss = self.rss = 0
        self._root = psutil.Process(pid)
        self._wanted = wanted
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Peaks:
        if self._wanted:
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        if self._wanted:
            self._thread.join()

    def _sample(self) -> None:
        due, sample, tree = time.perf_counter(), 0, []
        while not self._ended.is_set():
            if sample % _LOOK_EVERY == 0:
                tree = self._tree()
            sample += 1
            uss = rss = 0
            for process in tree:
                try:
                    memory = process.memory_full_info()
                except psutil.Error:  # it has ended meanwhile
                    continue
                uss, rss = uss + memory.uss, rss + memory.rss
            self.uss, self.rss = max(self.uss, uss), max(self.rss, rss)
            due = max(due + _SAMPLE_SECONDS, time.perf_counter())
            self._ended.wait(due - time.perf_counter())

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return []


def conditions() -> dict[str, Any]:
    """Hardware, load and date, as the other benchmarks keep them."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    features = " ".join(sorted(fields.get("flags", fields.get("Features", "")).split()))
    model = fields.get("model name") or platform.processor() or platform.machine()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "processor": f"{model} ({hashlib.sha256(features.encode()).hexdigest()[:8]})",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0],
    }


# ---------------------------------------------------------------------------------------------------------- data


def prepare(cases: list[Case], data: Path, version: Version) -> None:
    """Make what the cases need and is not there yet, each whole or not at all."""
    data.mkdir(parents=True, exist_ok=True)
    makers = {
        "demo.zarr": lambda path: make_demo(path, version),
        "plate-24x4.zarr": lambda path: make_plate(path, rows=4, columns=6, fields=4, shape=(512, 496)),
        "plate-200.zarr": lambda path: make_plate(path, rows=5, columns=10, fields=4, shape=(540, 540)),
        "slide-8192.zarr": lambda path: make_slide(path, side=8192),
    }
    for path in dict.fromkeys(case.data for case in cases):
        if path.parent == data and not path.exists():
            unfinished = path.with_name(f"unfinished-{path.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            makers[path.name](unfinished)
            unfinished.rename(path)


def make_demo(path: Path, version: Version) -> None:
    """The demo store of a version."""
    done = subprocess.run(
        [str(version.tool), "demo", str(path)], env=version.environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{version.tool} demo: {done.stdout[-500:]}{done.stderr[-500:]}")


def make_plate(path: Path, rows: int, columns: int, fields: int, shape: tuple[int, int], seed: int = 0) -> None:
    """Write an HCS plate (OME-Zarr 0.5) of uint16 fields that show nuclei, but for the first, which is empty."""
    names = [chr(ord("A") + row) for row in range(rows)], [f"{column + 1:02}" for column in range(columns)]
    places = [(row, column) for row in range(rows) for column in range(columns)]
    plate = zarr.open_group(str(path), mode="w", zarr_format=3)
    wells = [
        {"path": f"{names[0][row]}/{names[1][column]}", "rowIndex": row, "columnIndex": column}
        for row, column in places
    ]
    layout: dict[str, Any] = {"name": path.stem, "wells": wells, "field_count": fields}
    layout |= {key: [{"name": name} for name in of] for key, of in zip(("rows", "columns"), names, strict=True)}
    plate.attrs["ome"] = {"version": "0.5", "plate": layout}
    for number, about in enumerate(wells):
        well = plate.create_group(str(about["path"]))
        images = [{"path": str(field)} for field in range(fields)]
        well.attrs["ome"] = {"version": "0.5", "well": {"images": images}}
        for field in range(fields):
            rng = np.random.default_rng([seed, number, field])
            density = 1 / 2500 if number or field else 0.0
            _write_image(well.create_group(str(field)), nuclei(shape, density, rng), chunk=max(shape))


def make_slide(path: Path, side: int, seed: int = 0) -> None:
    """Write a uint16 slide (OME-Zarr 0.5) that repeats a pattern of nuclei."""
    part = nuclei((_PATTERN, _PATTERN), 1 / 2500, np.random.default_rng([seed, side]))
    times = -(-side // _PATTERN)
    _write_image(zarr.open_group(str(path), mode="w", zarr_format=3), np.tile(part, (times, times))[:side, :side], 512)


def nuclei(shape: tuple[int, int], density: float, rng: np.random.Generator) -> NDArray[np.uint16]:
    """Bright, soft ellipses of 16 to 36 px, ``density`` a px, some cut by the border, on a noisy background."""
    height, width = shape
    light = np.zeros(shape)
    for _ in range(round(density * height * width)):
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        radii, turn, bright = rng.uniform(8, 18, 2), rng.uniform(0, np.pi), rng.uniform(3000, 15000)
        reach = int(radii.max()) + 6
        top, left = max(0, int(y) - reach), max(0, int(x) - reach)
        rows, columns = np.mgrid[top : min(height, int(y) + reach), left : min(width, int(x) + reach)]
        along = (columns - x) * np.cos(turn) + (rows - y) * np.sin(turn)
        across = (rows - y) * np.cos(turn) - (columns - x) * np.sin(turn)
        inside = np.hypot(along / radii[0], across / radii[1])
        light[rows, columns] = np.maximum(light[rows, columns], bright / (1 + np.exp(10 * (inside - 1))))
    noisy = light + 600 + rng.normal(0, 60, shape) + rng.normal(0, 1, shape) * np.sqrt(light) * 3
    return noisy.round().clip(0, 65535).astype(np.uint16)


def _write_image(group: zarr.Group, pixels: NDArray[np.uint16], chunk: int) -> None:
    array = group.create_array(
        "0",
        shape=(1, *pixels.shape),
        dtype="uint16",
        chunks=(1, *(min(chunk, side) for side in pixels.shape)),
        dimension_names=("c", "y", "x"),
    )
    array[0] = pixels
    axes = [{"name": "c", "type": "channel"}, *({"name": a, "type": "space", "unit": "micrometer"} for a in "yx")]
    scale = [{"type": "scale", "scale": [1.0, 0.5, 0.5]}]
    multiscale: Any = {"name": "nuclei", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    window = {"min": 0, "max": 65535, "start": 0, "end": 20000}
    omero: Any = {"channels": [{"label": "DAPI", "color": "0000FF", "window": window}]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [multiscale], "omero": omero}


if __name__ == "__main__":
    main()
