"""The trainer's commands: each turns its flags into one call.  A recipe's field and its flag have one name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cellseg_batch.engine.cli import options as o
from cellseg_batch.engine.cli.console import check_json, plain_errors, write_json
from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.settings import Settings

_NETWORK, _PICTURES, _STEPS, _CARD = "Network", "Training pictures", "Optimisation", "The bundle's card"


def _flag(text: str, panel: str, *names: str) -> typer.models.OptionInfo:
    flag: typer.models.OptionInfo = typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)
    return flag


Data = Annotated[Path, typer.Argument(help="Annotated images: images/ with labels/, masks/ or COCO, or DSB folders.")]


def train(
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Folder of the bundle, its log and its pictures.")],
    preset: Annotated[str, typer.Option("--preset", help="A recipe's name or file; flags below change it.")] = "nuclei",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    fine_tune: Annotated[str | None, typer.Option("--fine-tune", help="Start from this model's weights.")] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, help="A shorter run.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    threads: o.Threads = None,
    network: Annotated[
        str | None, _flag("stem-unet, unet, unet-plus, unet-mobilenetv2, unet-resnet34.", _NETWORK)
    ] = None,
    width: Annotated[int | None, _flag("Channels of the first layers.", _NETWORK)] = None,
    depth: Annotated[int | None, _flag("Number of resolutions.", _NETWORK)] = None,
    merge_convs: Annotated[int | None, _flag("Convolutions after each merge (stem-unet).", _NETWORK)] = None,
    up: Annotated[str | None, _flag("transposed or bilinear.", _NETWORK)] = None,
    dropout: Annotated[float | None, _flag("Of the deepest features.", _NETWORK)] = None,
    grey: Annotated[bool | None, _flag("See the mean of the channels.", _NETWORK, "--grey/--colour")] = None,
    encoder_weights: Annotated[str | None, _flag("none, imagenet or a torchvision file.", _NETWORK)] = None,
    head: Annotated[str | None, _flag("semantic or instance.", _NETWORK)] = None,
    framing: Annotated[str | None, _flag("crop, or resize of the whole image.", _PICTURES)] = None,
    size: Annotated[int | None, _flag("Side in px.", _PICTURES)] = None,
    normalise: Annotated[str | None, _flag("percentile or fixed.", _PICTURES)] = None,
    low: Annotated[float | None, _flag("Percentile or pixel value that becomes 0.", _PICTURES)] = None,
    high: Annotated[float | None, _flag("Percentile or pixel value that becomes 1.", _PICTURES)] = None,
    augmentation: Annotated[str | None, _flag("none, flips or full.", _PICTURES)] = None,
    zoom_min: Annotated[float | None, _flag("Smallest magnification.", _PICTURES)] = None,
    zoom_max: Annotated[float | None, _flag("Largest magnification.", _PICTURES)] = None,
    plain: Annotated[float | None, _flag("Share of crops whose appearance stays.", _PICTURES)] = None,
    flat: Annotated[float | None, _flag("Share of the others in even colours.", _PICTURES)] = None,
    group_power: Annotated[float | None, _flag("Kinds are drawn by count ** this.", _PICTURES)] = None,
    loss: Annotated[str | None, _flag("A sum of bce, dice, focal.", _STEPS)] = None,
    optimiser: Annotated[str | None, _flag("adamw, adam or sgd.", _STEPS)] = None,
    learning_rate: Annotated[float | None, _flag("The schedule's peak.", _STEPS)] = None,
    weight_decay: Annotated[float | None, _flag("The optimiser's.", _STEPS)] = None,
    schedule: Annotated[str | None, _flag("cosine, one-cycle or constant.", _STEPS)] = None,
    warmup: Annotated[int | None, _flag("Steps of rising learning rate.", _STEPS)] = None,
    hold: Annotated[float | None, _flag("Share of the run before the cosine falls.", _STEPS)] = None,
    averaging: Annotated[float | None, _flag("Decay of the weights' average, 0 for none.", _STEPS)] = None,
    batch: Annotated[int | None, _flag("Pictures per step.", _STEPS)] = None,
    epochs: Annotated[int | None, _flag("Scores in a full run.", _STEPS)] = None,
    epoch_steps: Annotated[int | None, _flag("Steps between scores; 0: each image once.", _STEPS)] = None,
    patience: Annotated[int | None, _flag("Epochs without a better score; 0: never stop.", _STEPS)] = None,
    metric: Annotated[str | None, _flag("Keep the best by dice, iou or competition.", _STEPS)] = None,
    precision: Annotated[str | None, _flag("fp32, bf16 or fp16.", _STEPS)] = None,
    seed: Annotated[int | None, _flag("Of every random draw.", _STEPS)] = None,
    name: Annotated[str | None, _flag("Of the model.", _CARD)] = None,
    dataset: Annotated[str | None, _flag("The training images, in words.", _CARD)] = None,
    threshold: Annotated[float | None, _flag("Of the foreground's probability.", _CARD)] = None,
    margin: Annotated[int | None, _flag("Default tile margin in px.", _CARD)] = None,
    shrink_2: Annotated[float | None, _flag("Width in px from which images are shrunk by 2.", _CARD)] = None,
    shrink_4: Annotated[float | None, _flag("Width in px from which images are shrunk by 4.", _CARD)] = None,
    pixel_size_um: Annotated[float | None, _flag("µm per px; 0: not known.", _CARD)] = None,
    debug: o.Debug = False,
) -> None:
    """Train a model on DATA by a preset recipe; --out becomes the bundle of its best weights."""
    given = locals()
    with plain_errors(debug):
        from dataclasses import fields

        from cellseg_batch.engine.cli.trainer_screen import read_recipe, train_model
        from cellseg_batch.trainer.recipe import Recipe

        changes = {one.name: given[one.name] for one in fields(Recipe) if given[one.name] is not None}
        train_model(
            data,
            out,
            read_recipe(preset, changes),
            Console(),
            fine_tune=fine_tune,
            resume=resume,
            max_steps=max_steps,
            device=device,
            threads=threads,
        )


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Shipped models or bundle folders, then the folder of data.")],
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "val",
    rescale: Annotated[float, typer.Option("--rescale", min=0.1, help="Magnify images and truth by this.")] = 1.0,
    pictures: Annotated[
        Path | None, typer.Option("--pictures", metavar="DIR", help="Write a page of pictures for each model.")
    ] = None,
    threads: o.Threads = None,
    json_file: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Score MODELS on the annotated images of the last argument: pixels, instances and speed, by kind of image."""
    with plain_errors(debug):
        from cellseg_batch.engine.cli.trainer_screen import evaluate_models

        check_json(json_file)
        *bundles, data = models
        if not bundles:
            raise UsageError(
                "evaluate", expected="a model and a folder of data", found=data, remedy=f"try: evaluate nuclei {data}"
            )
        write_json(json_file, evaluate_models(bundles, Path(data), split, Console(), rescale, pictures, threads))


def export(
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    bundle: Annotated[str, typer.Argument(help="A shipped model's name, or a bundle's folder.")] = Settings.model,
    kind: Annotated[str, typer.Option("--format", help="torch (a .pt2 program) or onnx.")] = "torch",
    tile: Annotated[int, typer.Option("--tile", min=1, help="Side of its input in px.")] = 512,
    debug: o.Debug = False,
) -> None:
    """Write a model's network as a file for other tools, with a batch of 1 to 64 tiles."""
    with plain_errors(debug):
        from cellseg_batch.engine.cli.trainer_screen import export_model

        export_model(bundle, kind, tile, out, Console())
