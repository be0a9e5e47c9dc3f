"""The arrows between the rooms point one way, and heavy libraries are imported only where they are needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from cellseg_batch import engine, kernels, trainer

# Each room may import only from its own line's left.
ENGINE_ROOMS = (
    "errors",
    "object_stores",
    "locations",
    "settings",
    "stages",
    "stopping",
    "courses",
    "scheduler",
    "machine",
    "processes",
    "clusters",
    "files",
    "artefacts",
    "geometry",
    "slides",
    "memory",
    "written",
    "journal",
    "lock",
    "failures",
    "objects",
    "object_table",
    "models",
    "reader",
    "normalise",
    "background",
    "backends",
    "feed",
    "certificate",
    "race",
    "batch_queue",
    "engines",
    "place",
    "layout",
    "writer",
    "complete",
    "scratch",
    "seeds",
    "merge",
    "stitching",
    "runner",
    "device_runner",
    "plan",
    "working_scale",
    "measuring",
    "passes",
    "instances",
    "pipeline",
    "worker",
    "report",
    "prepare",
    "heatmap",
    "plates",
    "campaign",
    "estimate",
    "status",
    "verify",
    "image_layout",
    "convert",
    "screen",
    "profile",
    "bench",
    "seams",
    "info",
    "preview",
    "export_objects",
    "training",
    "compiling",
    "doctor",
    "charts",
    "page",
    "demo",
    "options",
    "shell",
    "flags",
    "measure_commands",
    "result_commands",
    "trainer_commands",
    "campaign_commands",
    "cli",
)
TRAINER_ROOMS = (
    "bundle",
    "scale",
    "encoders",
    "blocks",
    "unet",
    "footprint",
    "recipe",
    "schedule",
    "data",
    "augment",
    "losses",
    "metrics",
    "decode",
    "predict",
    "checkpoint",
    "learner",
    "validate",
    "outlines",
    "plots",
    "train",
    "evaluate",
    "export",
)


def imports_of(package, prefix):
    """(module, imported module) for every import of ours in a package."""
    folder = Path(package.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        module = path.relative_to(folder).with_suffix("").as_posix().removesuffix("/__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cellseg_batch."):
                target = node.module.split(".")
                names = (
                    [alias.name for alias in node.names if alias.name.islower()] if len(target) == 2 else [target[2]]
                )
                yield from ((f"{prefix}/{module}", f"{target[1]}/{name}") for name in names)


@pytest.mark.parametrize(
    ("package", "prefix", "rooms"), [(engine, "engine", ENGINE_ROOMS), (trainer, "trainer", TRAINER_ROOMS)]
)
def test_rooms_import_only_what_comes_before_them(package, prefix, rooms):
    for module, target in imports_of(package, prefix):
        room, target_package = module.split("/")[1], target.split("/")[0]
        assert room in (*rooms, "__init__"), f"{module} is in no list of rooms"
        if target_package == prefix and room != (other := target.split("/")[1]):
            assert rooms.index(other) < rooms.index(room), f"{module} imports {target}"


def test_packages_import_one_way():
    assert not [pair for pair in imports_of(kernels, "kernels") if not pair[1].startswith("kernels/")]
    assert not [pair for pair in imports_of(trainer, "trainer") if not pair[1].startswith("trainer/")]
    shared = {
        target
        for module, target in imports_of(engine, "engine")
        if target.startswith("trainer/") and module not in ("engine/training", "engine/trainer_commands")
    }
    assert shared == {"trainer/blocks", "trainer/bundle", "trainer/outlines", "trainer/scale", "trainer/unet"}, (
        "the engine knows a model only through its bundle"
    )


def test_modules_stay_small():
    long = {}
    for package in (engine, kernels, trainer):
        for path in Path(package.__file__).parent.rglob("*.py"):
            lines = len(path.read_text().splitlines())
            if lines > 300:
                long[path.name] = lines
    assert not long


@pytest.mark.parametrize(
    ("room", "without"),
    [("cli", ("torch", "openvino")), ("campaign", ("torch", "pyarrow", "scipy.ndimage", "dask", "skimage"))],
)
def test_what_only_some_runs_need_is_not_loaded_by_all(room, without):
    code = f"import sys, cellseg_batch.engine.{room}; print([name for name in {without} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
