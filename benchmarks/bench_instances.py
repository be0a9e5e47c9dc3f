"""Instances and tables of objects: whether they are right, the same however a slide is cut, and what they cost.

python benchmarks/bench_instances.py PART... --data FOLDER [--side 8192] [--precision bf16] [--rounds 5]

    val    the validation images through convert and run, fp32, against the trainer's evaluation of the same model, and
           how many objects the watershed of the trainer's decoding makes alike (IoU above 0.9)
    truth  slides of held-out pictures of each kind: F1 at IoU 0.5 and the competition metric, over nuclei that do not
           touch the border of a picture, where they are cut
    same   labels of blocks of 1024, 2048, 4096 px and 1 and 4 in flight against those of the slide in one block; its
           table against scikit-image's
    cost   time and memory of a run with and without --instances --objects, in bf16 and int8, taking turns
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from common import COMMAND, engine_flags, finish, pieces_of, row, save, segment, work_folder
from numpy.typing import NDArray
from skimage.measure import regionprops_table
from skimage.segmentation import relabel_sequential

from cellseg_batch.engine.models import build_torch_network, load_model
from cellseg_batch.engine.profiling.bench_slides import PATTERN, Form, write_slide
from cellseg_batch.engine.reports.sample_prediction import predict_in_one_pass
from cellseg_batch.engine.reports.scores import score as score_sample
from cellseg_batch.engine.reports.scores import summarise
from cellseg_batch.trainer.card import Normalisation
from cellseg_batch.trainer.data.dataset import load_dataset
from cellseg_batch.trainer.metrics import IOU_THRESHOLDS, average_precisions, instance_overlaps, matches

_ALIKE = 0.9  # intersection over union
_KINDS = ("fluo_small", "fluo_large", "tissue")
_OBJECTS = ["--instances", "--objects"]
# Blocks are whole tile cores, so the tiles have to be small ones.
_TILE = ["--tile", "640"]
Labels = NDArray[np.unsignedinteger[Any]]


def val(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    bundle = load_model("nuclei")
    network = build_torch_network(bundle)
    dataset = load_dataset(arguments.data, Normalisation(), only=("val",))
    samples = {sample.name: sample for sample in dataset.splits["val"]}
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for name in samples:
        shutil.copy(arguments.data / "images" / f"{name}.png", pictures)
    images = folder / "images.zarr"
    finish([*COMMAND, "convert", str(pictures), str(images)])
    report = segment(images, folder / "val", *engine_flags("fp32"), "--instances", keep=True, downscale=True)
    precisions, scores, alike, objects = [], [], 0, 0
    for number, slide in enumerate(report["slides"]):
        labels, sample = labels_of(report, number), samples[Path(slide["path"]).stem]
        precisions.append(average_precisions(instance_overlaps(labels, relabel_sequential(sample.labels)[0]).ious))
        prediction = predict_in_one_pass(bundle, network, sample)
        scores.append(score_sample(prediction, sample, ()))
        alike += matches(instance_overlaps(labels, prediction.labels).ious, _ALIKE)[0]
        objects += slide["objects"]
    evaluated = summarise(scores)
    ours = {"metric": float(np.mean(precisions)), "ap_50": float(np.mean(precisions, axis=0)[0])}
    trainer = {"metric": evaluated.competition, "ap_50": evaluated.ap[0]}
    return [
        row("run", [report["mpx_per_s"]], **ours, objects=objects, alike=alike),
        row("evaluate", [evaluated.mpx_per_s], **trainer),
    ]


def truth(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for kind in _KINDS:
        pieces = pieces_of(arguments.data, kind)
        slide = write_slide(folder / f"{kind}.zarr", Form(arguments.side), pieces)
        flags = [*engine_flags(arguments.precision), *_OBJECTS]
        report = segment(slide, folder / "truth", *flags, keep=True, downscale=True)
        true = np.asarray(zarr.open_array(str(slide), path="labels/truth", mode="r")[...])
        figures = score(labels_of(report), true, cuts(arguments.side, len(pieces[0][0])))
        rows.append(row(kind, [report["mpx_per_s"]], pictures=len(pieces), **figures))
    return rows


def cuts(side: int, piece: int) -> NDArray[np.bool_]:
    """Which rows, or columns, of a composed slide lie at the border of a picture."""
    position = np.arange(side) % PATTERN
    ends = np.isin(position % piece, (0, piece - 1)) | (position == PATTERN - 1)
    ends[-1] = True
    return ends


def score(predicted: Labels, true: Labels, ends: NDArray[np.bool_]) -> dict[str, Any]:
    """Scores of the predicted objects.

    True objects that touch a border are left out, and with them predicted objects that touch a border or lie mostly
    within such a true object.
    """
    areas_predicted, areas_true = np.bincount(predicted.ravel()), np.bincount(true.ravel())
    areas_predicted[0] = areas_true[0] = 0
    both = (predicted > 0) & (true > 0)
    pairs = predicted[both].astype(np.int64) * len(areas_true) + true[both]
    pairs, common = np.unique(pairs, return_counts=True)
    predicted_id, true_id = np.divmod(pairs, len(areas_true))
    ious = common / (areas_predicted[predicted_id] + areas_true[true_id] - common)
    left_out, skipped = touching(true, ends, len(areas_true)), touching(predicted, ends, len(areas_predicted))
    skipped[predicted_id[left_out[true_id] & (2 * common > areas_predicted[predicted_id])]] = True
    nuclei = int(np.count_nonzero((areas_true > 0) & ~left_out))
    objects = int(np.count_nonzero((areas_predicted > 0) & ~skipped))
    precisions = []
    for threshold in IOU_THRESHOLDS:
        matched = (ious > threshold) & ~left_out[true_id]
        hits, counted = np.count_nonzero(matched), np.count_nonzero(matched & ~skipped[predicted_id])
        precisions.append(float(hits / (nuclei + objects - counted)))
    return {"nuclei": nuclei, "f1": 2 * precisions[0] / (1 + precisions[0]), "metric": float(np.mean(precisions))}


def touching(labels: Labels, ends: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """Which of ``count`` ids lie at a border."""
    at_border = np.zeros(count, bool)
    at_border[np.unique(labels[ends])] = at_border[np.unique(labels[:, ends])] = True
    return at_border


def same(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    slide = write_slide(folder / "same.zarr", Form(arguments.side), pieces_of(arguments.data))
    flags = [*engine_flags(arguments.precision), *_TILE, *_OBJECTS]
    whole = segment(slide, folder / "whole", *flags, "--block", str(arguments.side), "--workers", "1", keep=True)
    expected, table = labels_of(whole), table_of(whole)
    pixels = np.moveaxis(np.asarray(zarr.open_array(str(slide), path="0", mode="r")[...]), 0, -1)
    differs = worst_difference(table, expected, pixels)
    rows = [row("one block", [whole["mpx_per_s"]], objects=len(table), worst_against_scikit_image=differs)]
    for block in (1024, 2048, 4096):
        for workers in (1, 4):
            cut = ["--block", str(block), "--workers", str(workers)]
            report = segment(slide, folder / "cut", *flags, *cut, keep=True)
            figures = {
                "blocks": report["slides"][0]["blocks"],
                "same_labels": bool(np.array_equal(labels_of(report), expected)),
                "same_table": table_of(report).equals(table),
            }
            rows.append(row(" ".join(cut), [report["mpx_per_s"]], objects=report["slides"][0]["objects"], **figures))
    return rows


def worst_difference(table: pa.Table, labels: Labels, pixels: NDArray[Any]) -> float:
    """The largest relative difference of any figure from scikit-image's; counts, areas and boxes must be exact."""
    names = ["label", "area", "bbox", "centroid", "perimeter", "axis_major_length", "axis_minor_length", "eccentricity"]
    light = ["intensity_mean", "intensity_min", "intensity_max", "intensity_std"]
    expected = regionprops_table(labels, pixels, [*names, *light])
    exact = {"id": "label", "area": "area"} | {
        f"bbox_{side}": f"bbox-{number}" for number, side in enumerate(("y0", "x0", "y1", "x1"))
    }
    close = {"centroid_y": "centroid-0", "centroid_x": "centroid-1", "perimeter": "perimeter"}
    close |= {"axis_major": "axis_major_length", "axis_minor": "axis_minor_length", "eccentricity": "eccentricity"}
    for number, channel in enumerate(("red", "green", "blue")):
        close |= {f"{name}_{channel}": f"{name}-{number}" for name in light}
    wrong = [ours for ours, theirs in exact.items() if not np.array_equal(table[ours].to_numpy(), expected[theirs])]
    if wrong:
        raise SystemExit(f"the table differs from scikit-image's in {', '.join(wrong)}")
    return max(
        float(np.max(np.abs(table[ours].to_numpy() - expected[theirs]) / np.maximum(np.abs(expected[theirs]), 1e-3)))
        for ours, theirs in close.items()
    )


def labels_of(report: dict[str, Any], slide: int = 0) -> Labels:
    return np.asarray(zarr.open_array(f"{report['slides'][slide]['labels']}/0", mode="r")[...])


def table_of(report: dict[str, Any]) -> pa.Table:
    return pq.read_table(report["slides"][0]["table"])


def cost(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    slide = write_slide(folder / "cost.zarr", Form(arguments.side), pieces_of(arguments.data))
    outputs = {"mask": [], "instances and objects": _OBJECTS}
    reports: dict[tuple[str, str], list[dict[str, Any]]] = {
        (precision, output): [] for precision in ("bf16", "int8") for output in outputs
    }
    for turn in range(arguments.rounds + 1):
        for (precision, output), runs in reports.items():
            report = segment(slide, folder / "cost", *engine_flags(precision), *outputs[output])
            if turn:  # the first run compiles
                runs.append(report)
                print(f"round {turn}: {precision}, {output} {report['seconds']:.2f} s", flush=True)
    rows = []
    for (precision, output), runs in reports.items():
        masks = reports[precision, "mask"]
        ratios = [report["seconds"] / mask["seconds"] for report, mask in zip(runs, masks, strict=True)]
        peaks = [max(report["peak_mb"] for report in reports_of) for reports_of in (runs, masks)]
        more = {"adds": median(ratios) - 1, "adds_mb": peaks[0] - peaks[1]} if runs is not masks else {}
        seconds = median(report["seconds"] for report in runs)
        rates = [report["mpx_per_s"] for report in runs]
        rows.append(row(f"{precision}, {output}", rates, seconds=seconds, peak_mb=peaks[0], **more))
    return rows


PARTS = {part.__name__: part for part in (val, truth, same, cost)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART")
    parser.add_argument("--data", type=Path, help="folder of annotated images; val and truth need it")
    parser.add_argument("--side", type=int, default=8192, help="of the slides in px")
    parser.add_argument("--precision", default="bf16", help="of truth and same")
    parser.add_argument("--rounds", type=int, default=5, help="of cost")
    parser.add_argument("--folder", type=Path, help="keep slides and labels here")
    arguments = parser.parse_args()
    if arguments.data is None and not {"val", "truth"}.isdisjoint(arguments.parts):
        parser.error("val and truth need --data")
    with work_folder(arguments.folder) as folder:
        for name in arguments.parts:
            save(f"instances_{name}", PARTS[name](arguments, folder), side=arguments.side)


if __name__ == "__main__":
    main()
