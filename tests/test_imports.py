"""Folders import from lower floors only, and heavy libraries are imported only where they are needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from cellseg_batch import engine, kernels, trainer

# Of the engine, from the top down. A folder may import from the floors below its own, and nothing from beside it.
FLOORS = (
    ("cli",),
    ("reports", "profiling"),
    ("run",),
    ("inference",),
    ("objects", "slides"),
    ("storage", "scheduling"),
    # The ground: single modules, which may import each other.
    ("settings", "backend_table", "geometry", "models", "machine", "stage_clock", "errors"),
)
FLOOR_OF = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
GROUND = len(FLOORS) - 1
# What the engine may know of the trainer: a model's bundle, its network, and what both draw and decide.
SHARED_WITH_TRAINER = {"blocks", "bundle", "card", "outlines", "receptive_field", "scale", "unet"}
RUNS_THE_TRAINER = {"cli.train", "cli.training_progress", "cli.evaluate", "cli.export"}
RUNS_THE_TRAINER |= {f"reports.{module}" for module in ("evaluate", "sample_prediction", "scores")}


def modules_of(package):
    folder = Path(package.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        yield path.relative_to(folder).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"), path


def imports_of(path):
    """Dotted names of ours below ``cellseg_batch`` that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("cellseg_batch"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cellseg_batch"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def engine_imports():
    """(module, imported name) below the engine, for every import in it of a name of ours."""
    for module, path in modules_of(engine):
        for name in imports_of(path):
            yield module, name.removeprefix("cellseg_batch.")


def test_every_module_of_the_engine_is_in_a_folder_that_has_a_floor():
    for module, _ in modules_of(engine):
        assert module == "__init__" or module.split(".")[0] in FLOOR_OF, f"{module} is on no floor"
    assert len(FLOORS[GROUND]) <= 8


def test_folders_import_from_lower_floors_only():
    for module, name in engine_imports():
        package, folder = name.split(".")[:2]
        own = module.split(".")[0]
        if package != "engine" or folder == own or folder not in FLOOR_OF:
            continue
        assert FLOOR_OF[folder] > FLOOR_OF[own] or FLOOR_OF[folder] == FLOOR_OF[own] == GROUND, (
            f"{module} imports {name}"
        )


def test_packages_import_one_way():
    for package, allowed in ((kernels, {"kernels"}), (trainer, {"trainer", "kernels"})):
        for module, path in modules_of(package):
            for name in imports_of(path):
                assert name.split(".")[1] in allowed, f"{module} imports {name}"


def test_the_engine_knows_a_model_only_through_its_bundle():
    for module, name in engine_imports():
        if name.startswith("trainer.") and module not in RUNS_THE_TRAINER:
            assert name.split(".")[1] in SHARED_WITH_TRAINER, f"{module} imports {name}"


def test_only_the_command_line_prints():
    for module, path in modules_of(engine):
        if not module.startswith("cli"):
            roots = {name for node in ast.walk(ast.parse(path.read_text())) for name in roots_of(node)}
            assert not roots & {"rich", "typer"}, f"{module} imports what only the command line may"


def roots_of(node):
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) and node.module else []


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("cli.main", ("torch", "openvino")),
        ("run.campaign", ("torch", "pyarrow", "scipy.ndimage", "dask", "skimage", "rich")),
    ],
)
def test_what_only_some_runs_need_is_not_loaded_by_all(module, without):
    code = f"import sys, cellseg_batch.engine.{module}; print([name for name in {without} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_machines_for_gpus_need_no_libraries_of_cpus_clusters_and_rare_pictures(tmp_path):
    code = """
import sys
sys.modules.update(dict.fromkeys(("openvino", "dask", "distributed", "imagecodecs")))
import numpy, cellseg_batch
mask = cellseg_batch.load_model("nuclei", backend="torch", precision="fp32").segment(numpy.zeros((64, 64), "uint8"))
print(mask.shape)
from cellseg_batch.engine.reports.doctor import diagnose
print([library.name for library in diagnose().libraries if library.name == "imagecodecs"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["(64,", "64)", "['imagecodecs']"], done.stderr
