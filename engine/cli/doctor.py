"""``cellseg-batch doctor``: print what this machine has and lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cellseg_batch.engine.cli.console import check_json, plain_errors, write_json
from cellseg_batch.engine.cli.flags import Debug, Json

if TYPE_CHECKING:
    from cellseg_batch.engine.reports.doctor import Diagnosis


def doctor(json_file: Json = None, debug: Debug = False) -> None:
    """Show this machine's devices and backends, what is missing and how to get it."""
    from cellseg_batch.engine.reports.doctor import diagnose

    with plain_errors(debug):
        check_json(json_file)
        diagnosis = diagnose()
        print_diagnosis(diagnosis, Console())
        write_json(json_file, diagnosis.to_json())


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print whether all is well, then what each part of the machine, backend, model and library is or lacks."""
    fault = diagnosis.fault
    verdict = Text(fault, "red") if fault else Text("all is well", "green")
    console.print(Text.assemble(f"cellseg-batch {diagnosis.version}: ", verdict), soft_wrap=True)
    table = Table()
    for heading in ("what", "found", "remedy"):
        table.add_column(heading, overflow="fold")
    memory, free = diagnosis.memory_bytes / 1e9, diagnosis.free_bytes / 1e9
    table.add_row("python", diagnosis.python, "")
    table.add_row("processor", f"{diagnosis.processor}, {diagnosis.cores} cores to use", "")
    table.add_row("memory", f"{memory:.1f} GB, {free:.1f} GB free", "")
    table.add_row("GPUs", Text("; ".join(diagnosis.gpus) or "none of NVIDIA's that has a driver"), "")
    if diagnosis.gpus:
        parts = diagnosis.gpu_proof.parts if diagnosis.gpu_proof else ()
        proven = "\n".join(part.line for part in parts) or "not proven here"
        failed = not parts or any(part.status == "failed" for part in parts)
        table.add_row("code for GPUs", Text(proven), "run bash benchmarks/gpu.sh in a clone" if failed else "")
    for state in diagnosis.backends:
        availability = state.reason or f"{state.version or 'missing'} on the {state.device}"
        table.add_row(f"backend {state.backend} {state.precision}", Text(availability), Text(state.remedy))
    compiled = f"{diagnosis.compiled_entries} entries in {diagnosis.compiled_folder}"
    table.add_row("compiled", Text(compiled), "compile --list")
    table.add_row("models", ", ".join(diagnosis.models) or "none", "")
    for library in diagnosis.libraries:
        table.add_row(library.name, library.version or "missing", Text(library.remedy))
    console.print(table)
