"""Options of `seggate models`: what is registered, what it is worth, and what serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gateway import promotion_cli
from gateway.command_options import DEFAULT_CONFIG, Config, Json
from gateway.training_cli import Phantoms, Weights

models = typer.Typer(
    help="Models: import, verify, test, promote, roll back.", no_args_is_help=True, rich_markup_mode=None
)
for _command in (promotion_cli.promote, promotion_cli.rollback, promotion_cli.compare, promotion_cli.history):
    models.command()(_command)


@models.command("import")
def models_import(
    path: Annotated[Path, typer.Argument(help="nnU-Net v2 result folder, its zip, a checkpoint, or a bundle.")],
    name: Annotated[str | None, typer.Option(help="Name here: a-z, 0-9 and '-'. Default: from the dataset.")] = None,
    semver: Annotated[str | None, typer.Option(help="MAJOR.MINOR.PATCH. Default: the card's, else 1.0.0.")] = None,
    card: Annotated[Path | None, typer.Option(help="Model card (TOML): codes, colours, contract.")] = None,
    configuration: Annotated[
        list[str] | None, typer.Option(help="Only this configuration, e.g. 3d_fullres; may be repeated.")
    ] = None,
    fold: Annotated[list[str] | None, typer.Option(help="Only this fold, e.g. 0; may be repeated.")] = None,
    orientation: Annotated[
        str | None,
        typer.Option(help="Voxel order of the training images, e.g. RAS or LPS; without it the model does not serve."),
    ] = None,
    weights: Weights = "float32",
    phantoms: Phantoms = True,
    sanity: Annotated[
        Path | None,
        typer.Option(
            help="Folder with images of yours as sanity cases (CASE_0000.nii.gz, reference CASE.nii.gz if there is "
            "one); they become part of the bundle.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    candidate: Annotated[bool, typer.Option("--candidate", help="Register without serving it.")] = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Import a model: load it safely, export it to ONNX, check parity, make sanity cases, register it. The first
    version serves, later ones wait until they are promoted. Needs the extra `train` unless it is a bundle."""
    from gateway.commands import models as command

    raise typer.Exit(
        command.import_(
            config,
            path,
            name=name,
            semver=semver,
            card=card,
            configurations=configuration,
            folds=fold,
            orientation=orientation,
            weights=weights,
            phantoms=phantoms,
            sanity=sanity,
            candidate=candidate,
            as_json=as_json,
        )
    )


@models.command("list")
def models_list(config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """List registered models and which version serves."""
    from gateway.commands import models as command

    raise typer.Exit(command.list_(config, as_json=as_json))


@models.command("show")
def models_show(
    name: Annotated[str, typer.Argument(help="Model name.")],
    semver: Annotated[str | None, typer.Option(help="A version; default: the one that serves.")] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Show one model: labels, contract, parity, digests, licence and origin, training, sanity cases, backends."""
    from gateway.commands import models as command

    raise typer.Exit(command.show(config, name, semver=semver, as_json=as_json))


@models.command("tune")
def models_tune(
    name: Annotated[str, typer.Argument(help="Model name.")],
    semver: Annotated[str | None, typer.Option(help="A version; default: the one that serves.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Share of the voxels that may change, and ten times as much of a label's Dice; default 1e-4."
        ),
    ] = None,
    mirroring: Annotated[
        Literal["full", "none"], typer.Option(help="none: try the model without its mirrored passes as well.")
    ] = "full",
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Where to compute; default: worker.device.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; default: worker.threads, or what is fastest.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Only this runtime: onnxruntime, openvino, torch; may be repeated. Default: the usual ones."),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Time for measuring, such as 60s or 10m; default 2m.")] = None,
    cases: Annotated[
        Path | None,
        typer.Option(
            help="Folder with images to compare labels on besides the sanity cases (CASE_0000.nii.gz).",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Measure what runs a model fastest on this machine with the labels of its export, and keep it as its execution
    plan: runtime, precision, threads, windows at a time. Only a tolerance allows labels to change more."""
    from gateway.commands import model_tuning as command

    options = command.TuneOptions(
        tolerance=tolerance,
        mirroring=mirroring,
        device=device,
        threads=threads,
        runtimes=tuple(backend) if backend else None,
        budget=budget,
        cases=cases,
    )
    raise typer.Exit(command.tune(config, name, semver=semver, options=options, as_json=as_json))


@models.command("verify")
def models_verify(
    name: Annotated[str | None, typer.Argument(help="Model name; default: all.")] = None,
    files_only: Annotated[bool, typer.Option("--files-only", help="Leave the sanity cases out.")] = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Hash every file of the registered bundles, compare with registration and ledger, and compute the sanity cases
    again on this machine: at most 1 voxel in 10,000 may differ from the export."""
    from gateway.commands import models as command

    raise typer.Exit(command.verify(config, name, files_only=files_only, as_json=as_json))


@models.command("test")
def models_test(
    name: Annotated[str, typer.Argument(help="Model name.")],
    semver: Annotated[str | None, typer.Argument(help="A version; default: the candidate.")] = None,
    change: Annotated[
        Literal["fine-tuning", "retraining", "import"], typer.Option(help="What kind of change the version is.")
    ] = "import",
    requested_by: Annotated[
        str | None, typer.Option(help="Who asked for the version, and may not promote it. Default: you.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a release note here (Markdown).", dir_okay=False)] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Examine a version by its model's change plan: files, sanity cases, and the locked cases beside the version that
    serves. Exit code 0 ACCEPTED, 1 REJECTED, 3 OUTSIDE_PLAN; 1 with no verdict when it could not be examined."""
    from gateway.commands import model_test as command

    raise typer.Exit(
        command.test(
            config,
            name,
            semver,
            change=change,
            requested_by=requested_by,
            report_file=report,
            as_json=as_json,
        )
    )


@models.command("shadow")
def models_shadow(
    name: Annotated[str, typer.Argument(help="Model name.")],
    semver: Annotated[str | None, typer.Argument(help="The version to run beside the one that serves.")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="Run none in shadow any more.")] = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Run a version in shadow: it makes its own results of live studies, which are compared and never leave."""
    from gateway.commands import model_shadow as command

    if (semver is None) != stop:
        raise typer.BadParameter("give a version, or --stop")
    raise typer.Exit(command.shadow(config, name, semver, as_json=as_json))


@models.command("watch")
def models_watch(
    name: Annotated[str, typer.Argument(help="Model name.")],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Show how far a model's version in shadow is, and the first studies of the version that serves with their
    limits."""
    from gateway.commands import model_shadow as command

    raise typer.Exit(command.watch(config, name, as_json=as_json))
