"""``cellseg-batch export``: write a model for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cellseg_batch.engine.cli.console import plain_errors, print_text
from cellseg_batch.engine.cli.flags import Debug
from cellseg_batch.engine.errors import UsageError, trainer_errors
from cellseg_batch.engine.settings import Settings


def export(
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    bundle: Annotated[str, typer.Argument(help="A shipped model's name, or a bundle's folder.")] = Settings.model,
    kind: Annotated[str, typer.Option("--format", help="torch (a .pt2 program) or onnx.")] = "torch",
    tile: Annotated[int, typer.Option("--tile", min=1, help="Side of the model's input in px.")] = 512,
    debug: Debug = False,
) -> None:
    """Write a model's network as a file for other tools, with a batch of 1 to 64 tiles."""
    from cellseg_batch.engine.inference.backends.fold_layers import fold_batch_norm, fold_upsampling
    from cellseg_batch.engine.models import load_model
    from cellseg_batch.trainer.export import export_network

    with plain_errors(debug):
        model = load_model(bundle)
        with trainer_errors(f"export {bundle}"):
            try:
                if kind == "onnx":  # what OpenVINO runs fastest, which reads such files as they are
                    export_network(model, kind, tile, out, lambda network: fold_upsampling(fold_batch_norm(network)))
                else:
                    export_network(model, kind, tile, out)
            except ModuleNotFoundError as error:
                raise UsageError(
                    "export --format onnx",
                    expected="the packages onnx and onnxscript",
                    found=str(error),
                    remedy="pip install 'cellseg-batch[onnx]'",
                ) from error
        stride = model.card.total_stride
        side = f"{tile}" if kind == "torch" else f"any whole {stride}"
        print_text(f"{out}: input (1 to 64, {model.card.input.count}, {side}, {side}) float32 in [0, 1]")
