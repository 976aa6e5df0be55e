"""Options of `seggate models promote`, `rollback`, `compare` and `history`."""

from __future__ import annotations

from typing import Annotated

import typer

from gateway.command_options import DEFAULT_CONFIG, Config, Json

Name = Annotated[str, typer.Argument(help="Model name.")]
By = Annotated[
    str | None,
    typer.Option(help="Who you are, where you share an account, as in a container. Default: the user, before sudo."),
]


def promote(
    name: Name,
    semver: Annotated[str, typer.Argument(help="The version that is to serve.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the ledger with your name.")] = "",
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Without what the change plan asks for; the only way for other labels or channels. Needs --reason; "
            "the ledger says so.",
        ),
    ] = False,
    requested_by: Annotated[
        str | None, typer.Option(help="Who asked for this version. Default: who had it examined.")
    ] = None,
    by: By = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Let a version serve that its change plan accepts: examined (`models test`), tried in shadow, asked for by someone
    else."""
    from gateway.commands import model_promotion as command

    raise typer.Exit(
        command.promote_model(
            config, name, semver, reason=reason, force=force, requested_by=requested_by, by=by, as_json=as_json
        )
    )


def rollback(
    name: Name,
    reason: Annotated[str, typer.Option(help="Why; kept in the ledger with your name.")] = "",
    by: By = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Take the version that serves out of service; the last stable one serves again."""
    from gateway.commands import model_promotion as command

    raise typer.Exit(command.roll_back_model(config, name, reason=reason, by=by, as_json=as_json))


def compare(
    name: Name,
    a: Annotated[str, typer.Argument(metavar="A", help="A version.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The version that is compared with it.")],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """What differs between two versions, and their figures side by side."""
    from gateway.commands import model_comparison as command

    raise typer.Exit(command.compare_models(config, name, a, b, as_json=as_json))


def history(name: Name, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Which version served when, and what the ledger has of the model."""
    from gateway.commands import model_promotion as command

    raise typer.Exit(command.show_history(config, name, as_json=as_json))
