"""Make the pages of the site that the code and the repository already hold, so that nothing is written twice.

mkdocs calls the functions whose names begin with ``on_``.  A warning fails ``mkdocs build --strict``.
"""

from __future__ import annotations

import ast
import html
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from run_blocks import with_included
from typer.core import TyperGroup

import cellseg_batch.engine
from cellseg_batch.engine.cli.main import app
from cellseg_batch.engine.objects.columns import COLUMNS

_ROOT = Path(__file__).parent.parent
# On the site under the paths that they have in the repository, so that links between them hold.
_FROM_REPOSITORY = (
    "engine/DESIGN.md",
    "benchmarks/README.md",
    "benchmarks/NOTES.md",
    "benchmarks/results/peers.png",
    "trainer/RESULTS.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
)
_log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in ``docs/``."""
    for path in _FROM_REPOSITORY:
        files.append(File.generated(config, path, abs_src_path=str(_ROOT / path)))
    files.append(File.generated(config, "commands.md", content=_commands()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in files and the table of columns; hold the messages of the troubleshooting page against the code."""
    if page.file.src_uri == "troubleshooting.md":
        for message in _unknown_messages(markdown):
            _log.warning("troubleshooting.md: no error of the engine expects %r", message)
    return with_included(markdown).replace("<!-- columns -->", _columns())


def _commands() -> str:
    """The page of all commands, from what ``--help`` shows."""
    group = typer.main.get_command(app)
    return "\n\n".join(["# Commands", *_describe(group, typer.Context(group, info_name="cellseg-batch"))])


def _describe(command: Any, context: Any) -> Iterator[str]:
    if not isinstance(command, TyperGroup) or command.invoke_without_command:
        yield f"## {context.command_path}\n\n{command.help}"
        yield f"```text\n{context.command_path} {' '.join(command.collect_usage_pieces(context))}\n```"
        panels: dict[str, list[str]] = {}
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record and "--help" not in parameter.opts:
                panel = getattr(parameter, "rich_help_panel", None) or "Arguments and flags"
                panels.setdefault(panel, []).append(_row(_code(record[0]), html.escape(record[1])))
        for panel, rows in panels.items():
            yield "\n".join([_row(panel, ""), "|---|---|", *rows])
    if isinstance(command, TyperGroup):
        for name in command.list_commands(context):
            _, member, _ = command.resolve_command(context, [name])
            yield from _describe(member, typer.Context(member, info_name=name, parent=context))


def _columns() -> str:
    """The table of the columns of a table of objects."""
    rows = [
        _row(
            _code(f"{column.name}{'_<channel>' if column.per_channel else ''}"),
            column.unit,
            f"{column.type}{', null without a pixel size' if column.needs_pixel_size else ''}",
            "yes" if column.is_measurement else "",
        )
        for column in COLUMNS
    ]
    return "\n".join([_row("column", "unit", "type", "measurement"), "|---|---|---|---|", *rows])


def _row(*cells: str) -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', '&#124;') for cell in cells)} |"


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def _unknown_messages(markdown: str) -> Iterator[str]:
    """The headings ```## `expected ...` ``` that no text of the engine holds; ``...`` stands for anything."""
    texts = [
        node.value
        for path in Path(cellseg_batch.engine.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    for line in markdown.splitlines():
        if line.startswith("### `expected "):
            message = line.removeprefix("### `expected ").removesuffix("`")
            if not all(any(part in text for text in texts) for part in message.split("...")):
                yield message
