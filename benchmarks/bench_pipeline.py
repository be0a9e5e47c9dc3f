"""End-to-end Mpx/s of ``cellseg-batch run``, one factor at a time around a usual slide, in parts of a few minutes.

python benchmarks/bench_pipeline.py PART... [--precision bf16] [--rounds 5] [--side 8192] [--fields 1000] [--quick]

    size        squares of 4096, 8192, 16384 and 32768 px
    cache       the slide in the system's cache, and dropped from it before every run
    pixels      uint8 RGB, uint16 single channel
    chunks      256 to 2048 px, and in shards of 2048 px
    pyramid     one level, five levels
    blocks      --block 2048, 4096, 8192
    workers     1 to 4 blocks in flight
    plate       fields of 1080 x 1080 px uint16 in an HCS plate, against the usual slide
    background  a slide that is 70 % empty, with and without --skip-background, and the objects that are found
    memory      peak of the process, also on a slide four times as wide; what it grows by over 1,000 blocks
    overhead    a run's time over that of the compiled model alone
    ceiling     the compiled model in a loop, against OpenVINO's own benchmark loop

Every run is a process of its own; variants take turns; a first run that does not count compiles.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from common import engine_flags, finish, pieces_of, row, save, segment, work_folder
from scipy import ndimage

from cellseg_batch.engine.profiling.bench_slides import Form, write_plate, write_slide

Variants = dict[str, tuple[Path, list[str]]]
"""Name -> slide and flags."""


class Lab:
    """Lab that writes each slide once and runs variants in turns."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder = folder
        self.side: int = arguments.side
        self.fields: int = arguments.fields
        self.rounds: int = arguments.rounds
        self.precision: str = arguments.precision
        self.flags = engine_flags(self.precision)
        self.pieces = pieces_of(arguments.data)

    def slide(self, side: int | None = None, **form: Any) -> Path:
        """A slide of the usual form but for ``form``."""
        side = side or self.side
        path = self.folder / ("-".join(["slide", str(side), *(f"{k}{v}" for k, v in form.items())]) + ".zarr")
        return path if path.exists() else write_slide(path, Form(side, **form), self.pieces)

    def measure(self, variants: Variants, before: Callable[[str], None] = lambda name: None) -> list[dict[str, Any]]:
        """A row for each variant; ``before`` is called ahead of each run."""
        reports: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        for turn in range(self.rounds + 1):
            for name, (slide, flags) in variants.items():
                before(name)
                report = segment(slide, self.folder / "out", *self.flags, *flags)
                if turn:
                    reports[name].append(report)
                    print(f"round {turn}: {name} {report['seconds']:.2f} s", flush=True)
        return [
            row(
                name,
                [report["mpx_per_s"] for report in every],
                opened_mpx_per_s=float(np.median([_rate_once_opened(report) for report in every])),
                engine_mpx_per_s=float(np.median([report["engine_mpx_per_s"] for report in every])),
                wall_seconds=float(np.median([report["wall"] for report in every])),
                peak_mb=max(report["peak_mb"] for report in every),
                computed_per_px=_computed(every[0]),
            )
            for name, every in reports.items()
        ]


def _rate_once_opened(report: dict[str, Any]) -> float:
    """Rate in Mpx/s from opening the slide to the mask on disk, without the command's imports."""
    return float(report["mpx_per_s"] * report["seconds"] / (report["seconds"] - report["starting_seconds"]))


def _computed(report: dict[str, Any]) -> float:
    """Pixels that the network computes per pixel of the slides."""
    tiles = sum(slide["tiles"] - slide["skipped_tiles"] for slide in report["slides"])
    return float(tiles * np.prod(report["tile"]) / sum(slide["pixels"] for slide in report["slides"]))


def size(lab: Lab) -> list[dict[str, Any]]:
    return lab.measure({f"{side} px": (lab.slide(side), []) for side in (4096, 8192, 16384, 32768)})


def cache(lab: Lab) -> list[dict[str, Any]]:
    slide = lab.slide()

    def before(name: str) -> None:
        if name == "cold":
            _drop(slide)

    return lab.measure({"warm": (slide, []), "cold": (slide, [])}, before)


def pixels(lab: Lab) -> list[dict[str, Any]]:
    return lab.measure({"uint8 RGB": (lab.slide(), []), "uint16": (lab.slide(dtype="uint16"), [])})


def chunks(lab: Lab) -> list[dict[str, Any]]:
    variants: Variants = {f"{chunk} px": (lab.slide(chunk=chunk), []) for chunk in (256, 512, 1024, 2048)}
    return lab.measure(variants | {"512 px in shards of 2048 px": (lab.slide(shard=2048), [])})


def pyramid(lab: Lab) -> list[dict[str, Any]]:
    return lab.measure({"1 level": (lab.slide(), []), "5 levels": (lab.slide(levels=5), [])})


def blocks(lab: Lab) -> list[dict[str, Any]]:
    return lab.measure({f"--block {block}": (lab.slide(), ["--block", str(block)]) for block in (2048, 4096, 8192)})


def workers(lab: Lab) -> list[dict[str, Any]]:
    return lab.measure({f"--workers {count}": (lab.slide(), ["--workers", str(count)]) for count in (1, 2, 3, 4)})


def plate(lab: Lab) -> list[dict[str, Any]]:
    path = lab.folder / f"plate-{lab.fields}.zarr"
    if not path.exists():
        write_plate(path, lab.fields, lab.pieces)
    rows = lab.measure({"slide": (lab.slide(), []), f"plate of {lab.fields} fields": (path, [])})
    rows[1]["of_the_slide"] = rows[1]["mpx_per_s"] / rows[0]["mpx_per_s"]
    return rows


def background(lab: Lab) -> list[dict[str, Any]]:
    slide = lab.slide(tissue=0.3)
    rows = lab.measure({skip: (slide, ["--skip-background", skip]) for skip in ("off", "auto")})
    rows[1]["faster"] = rows[1]["mpx_per_s"] / rows[0]["mpx_per_s"]
    rows[1]["faster_once_opened"] = rows[1]["opened_mpx_per_s"] / rows[0]["opened_mpx_per_s"]
    for variant in rows:
        flags = [*lab.flags, "--skip-background", variant["name"]]
        report = segment(slide, lab.folder / "kept", *flags, keep=True)
        mask = np.asarray(zarr.open_array(f"{report['slides'][0]['labels']}/0", mode="r")[...])
        variant |= {"objects": ndimage.label(mask)[1], "foreground": int(np.count_nonzero(mask))}
    return rows


def memory(lab: Lab) -> list[dict[str, Any]]:
    rows = []
    for side in (lab.side, 4 * lab.side):
        report = segment(lab.slide(side), lab.folder / "out", *lab.flags)
        rows.append(row(f"{side} px", [report["mpx_per_s"]], peak_mb=report["peak_mb"]))
    script = [sys.executable, str(Path(__file__).with_name("growth.py")), str(lab.slide(4 * lab.side)), str(lab.folder)]
    rows.append(json.loads(finish([*script, lab.precision]).output.strip().splitlines()[-1]))
    return rows


def overhead(lab: Lab) -> list[dict[str, Any]]:
    script = [sys.executable, str(Path(__file__).with_name("overhead.py")), str(lab.slide()), str(lab.folder)]
    output = finish([*script, lab.precision, str(lab.rounds)], CI="true").output
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def ceiling(lab: Lab) -> list[dict[str, Any]]:
    script = [sys.executable, str(Path(__file__).with_name("ceiling.py"))]
    output = finish([*script, lab.precision, str(3 * lab.rounds), str(lab.side)]).output
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def _drop(path: Path) -> None:
    """Drop the files below ``path`` from the system's cache."""
    os.sync()
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


PARTS = {
    part.__name__: part
    for part in (size, cache, pixels, chunks, pyramid, blocks, workers, plate, background, memory, overhead, ceiling)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=8192, help="of the usual slide in px")
    parser.add_argument("--fields", type=int, default=1000, help="of the plate")
    parser.add_argument("--data", type=Path, help="folder of annotated images; default: pictures of the package")
    parser.add_argument("--quick", action="store_true", help="2 rounds, 250 fields")
    parser.add_argument("--folder", type=Path, help="keep the slides here, for another call")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.fields = 2, 250
    with work_folder(arguments.folder) as folder:
        lab = Lab(folder, arguments)
        for name in arguments.parts:
            precision = "" if lab.precision == "bf16" else f"_{lab.precision}"
            save(f"{name}{precision}", PARTS[name](lab), precision=lab.precision, side=lab.side)


if __name__ == "__main__":
    main()
