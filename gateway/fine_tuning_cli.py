"""Options of `seggate train fine-tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gateway.command_options import Json
from gateway.training_cli import (
    MOST_SEED,
    Budget,
    CompileNetwork,
    Deterministic,
    Device,
    Devices,
    KeepLogits,
    Precision,
    Probe,
    Processes,
    Threads,
)


def train_fine_tune(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Its folder: RESULTS/DATASET/TRAINER__PLANS__CONFIGURATION."),
    ],
    cases: Annotated[
        Path, typer.Option(help="The new cases, a dataset in nnU-Net's format with the model's labels and channels.")
    ],
    results: Annotated[
        Path, typer.Option(help="Folder that gets a folder for the dataset, with the fine-tuned model.")
    ],
    old: Annotated[
        Path | None,
        typer.Option(
            help="The dataset that the model was trained on. Default: the one kept with a model that was fine-tuned "
            "itself, else DATASET in the folder that the variable nnUNet_raw names."
        ),
    ] = None,
    preprocessed: Annotated[
        Path | None,
        typer.Option(
            envvar="nnUNet_preprocessed",
            help="Folder with the old dataset's splits and preprocessed cases, which need not be made again then. "
            "Default: the one kept with a model that was fine-tuned itself.",
        ),
    ] = None,
    fold: Annotated[
        list[str] | None, typer.Option(help="0, 1, ... or `all`; may be repeated. Default: all that the model has.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, max=10, help="Epochs of a fold.")] = 10,
    iterations: Annotated[int, typer.Option(min=1, help="Steps of an epoch.")] = 250,
    rehearsal: Annotated[
        float, typer.Option(min=0.25, max=0.5, help="The part of all samples that is of old cases.")
    ] = 0.5,
    budget: Budget = None,
    precision: Precision = "auto",
    deterministic: Deterministic = False,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Decides patches and augmentation.")] = 0,
    device: Device = "auto",
    devices: Devices = 1,
    compile_network: CompileNetwork = "auto",
    probe: Probe = True,
    threads: Threads = None,
    keep_logits: KeepLogits = True,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a trained model on new cases, with rehearsal of the old ones; go on where it was stopped. Ctrl-C and
    SIGTERM write a checkpoint first."""
    from gateway.commands import fine_tune as command

    options = command.FineTuneOptions(
        model=model,
        cases=cases,
        results=results,
        old=old,
        preprocessed=preprocessed,
        folds=tuple(fold or ()),
        epochs=epochs,
        iterations=iterations,
        rehearsal=rehearsal,
        budget=budget,
        precision=precision,
        deterministic=deterministic,
        seed=seed,
        device=device,
        devices=devices,
        compile=compile_network,
        probes=probe,
        threads=threads,
        keeps_logits=keep_logits,
        processes=processes,
    )
    raise typer.Exit(command.fine_tune(options, as_json=as_json))
