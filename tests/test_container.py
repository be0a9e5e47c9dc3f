"""The container's content: built by its script into a Debian root file system, run there without network and home."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_TOOLS = ("mmdebstrap", "bwrap")
_MISSING = [tool for tool in _TOOLS if shutil.which(tool) is None]
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def _folders_of_pip():
    """Folders of this machine in which pip looks for packages."""
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    paths = {Path(word.removeprefix("file://")) for word in re.findall(r"(?:file://)?/[^ '\"]+", said)}
    return sorted(path for path in paths if path.is_dir())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A Debian root file system with the engine."""
    if _MISSING or os.geteuid():
        pytest.skip(f"a root file system cannot be built here: {', '.join(_MISSING) or 'not root'}")
    folder = tmp_path_factory.mktemp("container")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", ROOT, "-w", folder], check=True)
    (wheel,) = folder.glob("*.whl")
    root = folder / "root"
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=apt", "--include=ca-certificates", "bookworm", root], check=True
    )
    for file in (wheel, ROOT / "container" / "build.sh"):
        shutil.copy(file, root / "tmp")
    shutil.copy("/etc/resolv.conf", root / "etc")
    command = ["bwrap", "--bind", root, "/", "--proc", "/proc", "--dev", "/dev"]
    # Packages come from where pip of this machine finds them.
    for path in (_CERTIFICATES, *_folders_of_pip()):
        command += ["--ro-bind", path, path]
    command += [
        "--setenv",
        "PATH",
        "/usr/sbin:/usr/bin:/sbin:/bin",
        "--setenv",
        "TORCH_INDEX",
        "https://pypi.org/simple",
    ]
    subprocess.run([*command, "bash", "/tmp/build.sh", f"/tmp/{wheel.name}"], check=True)
    yield root
    shutil.rmtree(root)


@pytest.mark.slow
def test_it_runs_without_network_home_and_a_writable_root(root, tmp_path):
    (data := tmp_path / "data").mkdir()
    (cache := tmp_path / "cache").mkdir()
    sandbox = ["bwrap", "--ro-bind", root, "/", "--bind", data, "/data", "--bind", cache, "/cache", "--tmpfs", "/tmp"]
    sandbox += ["--proc", "/proc", "--dev", "/dev", "--unshare-all", "--uid", "1000", "--gid", "1000", "--clearenv"]
    sandbox += ["--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin", "--setenv", "CELLSEG_CACHE_DIR", "/cache"]
    sandbox += ["--chdir", "/data"]
    readme = (ROOT / "container" / "README.md").read_text()
    (block,) = re.findall(r"```bash\n(cellseg-batch demo.*?)```", readme, re.DOTALL)
    said = [
        subprocess.run([*sandbox, *line.split()], check=True, capture_output=True, text=True).stdout
        for line in block.splitlines()
    ]
    assert "5 done" in said[1]
    assert "5 skipped" in said[2]
    assert (data / "report.html").stat().st_size > 10_000
