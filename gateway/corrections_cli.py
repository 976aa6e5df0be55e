"""Options of `seggate corrections`: what readers say of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gateway.command_options import DEFAULT_CONFIG, Config, Json

corrections = typer.Typer(help="What readers say of results.", no_args_is_help=True, rich_markup_mode=None)


@corrections.command("add")
def corrections_add(
    result: Annotated[
        str,
        typer.Argument(metavar="RESULT_OR_STUDY", help="Result id, or a study's UID; the beginning of it is enough."),
    ],
    seg: Annotated[Path | None, typer.Option(help="A DICOM SEG with the right labels.", exists=True)] = None,
    nifti: Annotated[
        Path | None,
        typer.Option(help="A NIfTI label map with the right labels, on the grid of the series.", exists=True),
    ] = None,
    approve: Annotated[bool, typer.Option("--approve", help="The result's own labels are right.")] = False,
    reject: Annotated[
        bool, typer.Option("--reject", help="There are no usable labels: learn nothing from it.")
    ] = False,
    opened: Annotated[bool, typer.Option("--opened", help="It was looked at, and nothing was said.")] = False,
    missing: Annotated[
        Literal["refuse", "keep", "erase"],
        typer.Option(help="Labels that the result has and a SEG does not describe: an error, taken from it, or none."),
    ] = "refuse",
    by: Annotated[str | None, typer.Option(help="Who says so. Default: the user of this machine.")] = None,
    reason: Annotated[
        str | None, typer.Option(help="Why; kept in the ledger with who said it: nothing about the patient.")
    ] = None,
    seconds: Annotated[int | None, typer.Option(min=0, help="How long the reader took.")] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Keep what a reader says of a result: approved, corrected (--seg or --nifti), rejected, or only opened."""
    from gateway.commands import corrections as command

    said = [kind for kind, given in (("approved", approve), ("rejected", reject), ("opened", opened)) if given]
    files = [file for file in (seg, nifti) if file is not None]
    if len(said) + len(files) != 1:
        raise typer.BadParameter("one of --seg, --nifti, --approve, --reject and --opened is needed")
    raise typer.Exit(
        command.add(
            config,
            result,
            kind=said[0] if said else "corrected",
            file=files[0] if files else None,
            is_nifti=nifti is not None,
            missing=missing,
            by=by,
            reason=reason,
            seconds=seconds,
            as_json=as_json,
        )
    )


@corrections.command("list")
def corrections_list(
    model: Annotated[str | None, typer.Argument(help="A model's name. Default: all.")] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """List what counts of each result that a reader looked at, with its Dice against the right labels."""
    from gateway.commands import corrections as command

    raise typer.Exit(command.list_(config, model, as_json=as_json))


@corrections.command("export")
def corrections_export(
    folder: Annotated[Path, typer.Argument(help="Gets a folder for each model, with images and labels.")],
    model: Annotated[str | None, typer.Option(help="Only this model. Default: every model in learning.toml.")] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Write the chosen cases that wait for labels as NIfTI, images and the model's labels, named by results."""
    from gateway.commands import corrections as command

    raise typer.Exit(command.export(config, folder, model=model, as_json=as_json))
