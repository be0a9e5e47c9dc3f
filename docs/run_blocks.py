"""Run the blocks of the pages that a reader can run, page by page in a fresh folder, from top to bottom.

    python docs/run_blocks.py [--pictures] [PAGE ...]

A block is one of these if the line before it is ``<!-- run -->``.  With ``--pictures``, the pictures of the site are
made anew: a picture that a block makes and that is in ``docs/pictures`` replaces the one there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

_DOCS = Path(__file__).parent
_BLOCK = re.compile(r"^<!-- run -->\n```(bash|python)\b[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INCLUDED = re.compile(r"^# include: (.+)$", re.MULTILINE)
_COMMANDS = {"bash": ["bash", "-euo", "pipefail", "-s"], "python": [sys.executable, "-"]}
_SIDES, _COLOURS, _MOST_BYTES = (1000, 800, 640, 560, 480), 96, 150_000


def with_included(text: str) -> str:
    """A text in which each line ``# include: NAME`` is the file of that name in ``docs/``."""
    return _INCLUDED.sub(lambda included: (_DOCS / included[1]).read_text().rstrip("\n"), text)


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """The marked blocks of a page: line, language, and text with the files that it includes."""
    text = page.read_text()
    for match in _BLOCK.finditer(text):
        yield text.count("\n", 0, match.start()) + 2, match[1], with_included(match[2])


def run_page(page: Path, folder: Path) -> None:
    """Run the blocks of a page in ``folder``.

    Raises:
        SystemExit: a block failed.
    """
    for line, language, code in blocks(page):
        begun = time.perf_counter()
        ran = subprocess.run(_COMMANDS[language], input=code, cwd=folder, text=True, capture_output=True)
        print(f"{page.name}:{line}  {time.perf_counter() - begun:.1f} s", flush=True)
        if ran.returncode:
            sys.exit(f"{code}\n{ran.stdout}\n{ran.stderr}\n{page}:{line}: exit code {ran.returncode}")


def keep_pictures(folder: Path) -> None:
    """Replace pictures of the site by those of the same name in ``folder``, small enough for a page."""
    for old in (_DOCS / "pictures").glob("*.png"):
        for new in folder.rglob(old.name):
            for side in _SIDES:
                with Image.open(new) as picture:
                    picture.thumbnail((side, side))
                    picture.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(old, optimize=True)
                if old.stat().st_size <= _MOST_BYTES:
                    break


def main() -> None:
    """Run the pages that the command line names, else all."""
    names = [name for name in sys.argv[1:] if name != "--pictures"]
    for page in [Path(name) for name in names] or sorted(_DOCS.glob("*.md")):
        with tempfile.TemporaryDirectory() as folder:
            run_page(page, Path(folder))
            if "--pictures" in sys.argv[1:]:
                keep_pictures(Path(folder))


if __name__ == "__main__":
    main()
