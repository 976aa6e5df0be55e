"""Options from a dataset to a model: `seggate plan`, `train`, `evaluate`, `select` and `export`.

A word after `train` that is no subcommand is the dataset, so `seggate train DIR` trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from gateway.command_options import Json

Dataset = Annotated[Path, typer.Argument(metavar="DATASET", help="A dataset in nnU-Net's format: DatasetNNN_Name.")]
Results = Annotated[
    Path, typer.Option(envvar="nnUNet_results", help="Folder that gets a folder for the dataset, with its models.")
]
Preprocessed = Annotated[
    Path, typer.Option(envvar="nnUNet_preprocessed", help="Folder with the dataset's plans and preprocessed cases.")
]
PlansName = Annotated[
    str | None, typer.Option(help="Which plans, e.g. nnUNetResEncUNetMPlans. Default: the only ones.")
]
DatasetName = Annotated[str | None, typer.Option(help="The name given to `seggate plan`. Default: the folder's.")]
Configurations = Annotated[list[str] | None, typer.Option("--configuration", help="E.g. 3d_fullres; may be repeated.")]
Profile = Annotated[
    Literal["nnunet", "article"],
    typer.Option(help="nnU-Net's way, or the article's: hold-out, early stopping, ensemble of everything."),
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Worker processes, each with a case in memory. Default: the cores, at most 8."),
]
Precision = Annotated[
    Literal["auto", "float32", "bf16", "fp16"],
    typer.Option(help="auto: fp16 on a GPU, bf16 on a processor that computes in it, else float32."),
]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Bit-identical on the same kind of processor, with as many threads."),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to train.")]
Devices = Annotated[
    int, typer.Option(min=1, help="GPUs (or processes of a processor) that share every batch of a fold.")
]
CompileNetwork = Annotated[
    Literal["auto", "on", "off"],
    typer.Option("--compile", help="torch.compile. auto: on a GPU, if it proves faster by 5 %."),
]
Probe = Annotated[
    bool, typer.Option("--probe/--no-probe", help="Measure first whether a step fits into the device's memory.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch in each process. Default: its own choice.")]
KeepLogits = Annotated[
    bool,
    typer.Option(
        "--keep-logits/--no-keep-logits",
        help="Keep the validation's logits: `seggate select` needs them for ensembles of configurations.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(help="Time for each fold, e.g. 30m or 1h30m; the learning rate falls to 0 within it."),
]
Weights = Annotated[
    Literal["float32", "fp16"],
    typer.Option(help="How weights are stored. fp16 halves the files; refused where the sanity cases change by it."),
]
Phantoms = Annotated[
    bool,
    typer.Option(
        "--phantoms/--no-phantoms", help="Sanity cases from invented images, which cost a few predictions by torch."
    ),
]
Calibrates = Annotated[
    bool,
    typer.Option(
        "--calibration/--no-calibration",
        help="Predict the validation cases with the bundle, so that the gateway can estimate the quality of results.",
    ),
]


MOST_SEED = 2**63 - 1
"""A fold adds its number, and what random numbers are made from has 64 bits."""


class _TrainGroup(TyperGroup):
    """`seggate train WORD` is `seggate train run WORD` unless WORD is a subcommand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


train = typer.Typer(
    cls=_TrainGroup,
    help="Train a model: `seggate train DATASET`, `seggate train status DATASET`, `seggate train stop DATASET`. "
    "The options of a training: `seggate train run --help`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def plan(
    folder: Annotated[Path | None, typer.Argument(help="A dataset in nnU-Net's format: DatasetNNN_Name.")] = None,
    planner: Annotated[
        Literal["ExperimentPlanner", "ResEncM", "ResEncL", "ResEncXL"],
        typer.Option(help="nnU-Net's planner: a plain U-Net for 8 GB, or residual encoders for 8, 24 and 40 GB."),
    ] = "ExperimentPlanner",
    profile: Annotated[
        Literal["nnunet", "article"],
        typer.Option(help="Which configurations are made: by nnU-Net's rules or the article's."),
    ] = "nnunet",
    gpu_memory_gb: Annotated[
        float | None, typer.Option(min=1, help="GPU memory to plan for. Default: the planner's own.")
    ] = None,
    overwrite_target_spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(metavar="Z Y X", help="Spacing to resample to, in mm, axes as stored. Default: the median."),
    ] = None,
    plans_name: Annotated[
        str | None, typer.Option(help="Name of the plans. Default: the planner's and profile's.")
    ] = None,
    splits: Annotated[
        Literal["nnunet", "stratified", "extend"] | None,
        typer.Option(
            help="Folds: nnU-Net's random ones, or whole patients evened out by volume and labels. Default: stratified "
            "where dataset.json names patients, else nnunet. extend: new cases join the folds that are there."
        ),
    ] = None,
    fingerprint: Annotated[
        Path | None, typer.Option(help="A fingerprint made elsewhere, instead of the folder; with --dataset-json.")
    ] = None,
    dataset_json: Annotated[Path | None, typer.Option(help="The dataset.json that goes with --fingerprint.")] = None,
    dataset_name: Annotated[str | None, typer.Option(help="Name in the plans. Default: the folder's.")] = None,
    preprocessed: Annotated[
        Path, typer.Option(envvar="nnUNet_preprocessed", help="Folder that gets a folder for the dataset.")
    ] = Path("preprocessed"),
    out: Annotated[Path | None, typer.Option(help="File for the plans. Default: PREPROCESSED/NAME/PLANS.json.")] = None,
    processes: Processes = None,
    plans_only: Annotated[bool, typer.Option("--plans-only", help="Plan, and preprocess nothing.")] = False,
    configuration: Annotated[
        list[str] | None,
        typer.Option(help="Preprocess only this configuration, e.g. 3d_fullres; may be repeated. Default: all."),
    ] = None,
    probe: Annotated[
        bool | None,
        typer.Option(
            "--probe/--no-probe",
            help="Measure a training step's memory on the device; with the profile article, choose a batch and patch "
            "that fill 90 % of it. Default: with that profile, where there is a GPU.",
        ),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to measure, and later to train.")
    ] = "auto",
    precision: Annotated[
        Literal["auto", "float32", "bf16", "fp16"], typer.Option(help="What to measure in, and later to train in.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Plan a training dataset (fingerprint, patch, batch, network, splits) and preprocess its cases, resumably."""
    from gateway.commands import plan as command

    options = command.PlanOptions(
        folder=folder,
        fingerprint=fingerprint,
        dataset_json=dataset_json,
        dataset_name=dataset_name,
        planner=planner,
        profile=profile,
        gpu_memory_gb=gpu_memory_gb,
        overwrite_target_spacing=overwrite_target_spacing,
        plans_name=plans_name,
        splits=splits,
        preprocessed=preprocessed,
        out=out,
        processes=processes,
        plans_only=plans_only,
        configurations=tuple(configuration or ()),
        probe=probe,
        device=device,
        precision=precision,
    )
    raise typer.Exit(command.plan(options, as_json=as_json))


@train.command("run")
def train_run(
    folder: Dataset,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Plan, preprocess, train every configuration and fold, select and export."),
    ] = False,
    configuration: Configurations = None,
    fold: Annotated[
        list[str] | None,
        typer.Option(help="0, 1, ... of the splits; `all`: on every case; `all-folds` (default). May be repeated."),
    ] = None,
    profile: Profile = "nnunet",
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of a fold. Default: 1000.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Steps of an epoch. Default: 250.")] = None,
    budget: Budget = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Profile article: epochs without a better score before a fold ends. Default: 30."),
    ] = None,
    precision: Precision = "auto",
    deterministic: Deterministic = False,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Decides weights, patches and augmentation.")] = 0,
    device: Device = "auto",
    devices: Devices = 1,
    compile_network: CompileNetwork = "auto",
    probe: Probe = True,
    threads: Threads = None,
    sides: Annotated[
        Literal["keep", "swap", "ignore"],
        typer.Option(
            help="Where labels are left and right: do not mirror the lateral axis, mirror it and swap the labels, or "
            "mirror everything as nnU-Net does."
        ),
    ] = "keep",
    mirror: Annotated[
        Literal["all", "lateral", "none"],
        typer.Option(help="Axes that are mirrored in training and prediction: all, as nnU-Net, or only left to right."),
    ] = "all",
    keep_logits: KeepLogits = True,
    calibration: Calibrates = True,
    plans_name: PlansName = None,
    dataset_name: DatasetName = None,
    preprocessed: Preprocessed = Path("preprocessed"),
    results: Results = Path("results"),
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Train and validate folds; go on where it was stopped. Ctrl-C and SIGTERM write a checkpoint first."""
    from gateway.commands import train as command

    options = command.TrainOptions(
        folder=folder,
        configurations=tuple(configuration or ()),
        folds=tuple(fold or ()),
        profile=profile,
        epochs=epochs,
        iterations=iterations,
        budget=budget,
        patience=patience,
        precision=precision,
        deterministic=deterministic,
        seed=seed,
        device=device,
        devices=devices,
        compile=compile_network,
        probes=probe,
        threads=threads,
        sides=sides,
        mirror=mirror,
        keeps_logits=keep_logits,
        plans_name=plans_name,
        dataset_name=dataset_name,
        preprocessed=preprocessed,
        results=results,
        processes=processes,
        calibrates=calibration,
    )
    if everything:
        from gateway.commands import train_all

        raise typer.Exit(train_all.train_all(options, as_json=as_json))
    raise typer.Exit(command.train(options, as_json=as_json))


@train.command("status")
def train_status(folder: Dataset, results: Results = Path("results"), as_json: Json = False) -> None:
    """Which folds are running, stopped or finished, and how far they are."""
    from gateway.commands import train as command

    raise typer.Exit(command.status(folder, results, as_json=as_json))


@train.command("stop")
def train_stop(
    folder: Dataset,
    configuration: Configurations = None,
    fold: Annotated[list[str] | None, typer.Option(help="Only this fold; may be repeated. Default: all.")] = None,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Ask what is being trained to write a checkpoint and end; `seggate train DATASET` goes on from there."""
    from gateway.commands import train as command

    raise typer.Exit(
        command.stop(folder, results, configurations=configuration or [], folds=fold or [], as_json=as_json)
    )


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder with label maps.", exists=True, file_okay=False)],
    references: Annotated[
        Path, typer.Argument(help="Folder with the references, under the same names.", exists=True, file_okay=False)
    ],
    dataset_json: Annotated[
        Path | None, typer.Option(help="Names the labels. Default: the one in or above either folder.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The summary. Default: PREDICTIONS/summary.json.")] = None,
    chill: Annotated[bool, typer.Option("--chill", help="References without a prediction are no error.")] = False,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Compare label maps with references: Dice, HD95 and surface Dice per label, and nnU-Net's summary.json."""
    from gateway.commands import evaluate as command

    raise typer.Exit(
        command.evaluate(
            predictions,
            references,
            dataset_json=dataset_json,
            out=out,
            chill=chill,
            processes=processes,
            as_json=as_json,
        )
    )


def select(
    folder: Dataset,
    profile: Profile = "nnunet",
    configuration: Configurations = None,
    fold: Annotated[
        list[str] | None, typer.Option(help="Only this fold; may be repeated. Default: all of the splits.")
    ] = None,
    plans_name: PlansName = None,
    dataset_name: DatasetName = None,
    preprocessed: Preprocessed = Path("preprocessed"),
    results: Results = Path("results"),
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Choose by cross-validation: the best model or pair of models (article: all of them), and its post-processing."""
    from gateway.commands import select as command

    raise typer.Exit(
        command.select(
            folder,
            profile=profile,
            configurations=configuration or [],
            folds=fold or [],
            plans_name=plans_name,
            dataset_name=dataset_name,
            preprocessed=preprocessed,
            results=results,
            processes=processes,
            as_json=as_json,
        )
    )


def export(
    folder: Dataset,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the bundle. Default: RESULTS/NAME/bundles/SEMVER.")
    ] = None,
    card: Annotated[Path | None, typer.Option(help="Model card (TOML): codes, colours, contract, licence.")] = None,
    name: Annotated[str | None, typer.Option(help="Name: a-z, 0-9 and '-'. Default: from the dataset.")] = None,
    semver: Annotated[str | None, typer.Option(help="MAJOR.MINOR.PATCH. Default: the card's, else 1.0.0.")] = None,
    weights: Weights = "float32",
    phantoms: Phantoms = True,
    sanity_case: Annotated[
        list[str] | None,
        typer.Option(
            help="A case of the dataset as a sanity case; may be repeated. Its image and labels become part of the "
            "bundle."
        ),
    ] = None,
    calibration: Calibrates = True,
    plans_name: PlansName = None,
    dataset_name: DatasetName = None,
    preprocessed: Preprocessed = Path("preprocessed"),
    results: Results = Path("results"),
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Make a model bundle of what `select` chose: ONNX, parity, sanity cases, the intensity baseline, and the
    cross-validation's figures in its card."""
    from gateway.commands import export as command

    raise typer.Exit(
        command.export(
            folder,
            out=out,
            card=card,
            name=name,
            semver=semver,
            weights=weights,
            phantoms=phantoms,
            sanity_cases=sanity_case or [],
            plans_name=plans_name,
            dataset_name=dataset_name,
            preprocessed=preprocessed,
            results=results,
            processes=processes,
            calibrates=calibration,
            as_json=as_json,
        )
    )
