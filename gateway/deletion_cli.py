"""Commands of what is deleted and what must not be: `seggate retention`, `delete`, `keep` (gateway/cli.py)."""

from __future__ import annotations

from typing import Annotated

import typer

from gateway.command_options import DEFAULT_CONFIG, Config, Json


def retention(
    config: Config = DEFAULT_CONFIG,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing: list what would go, and why each other study stays.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete now what [retention] in gateway.toml says, the longest delivered first."""
    from gateway.commands import retention as command

    raise typer.Exit(command.retention(config, dry_run=dry_run, yes=yes, as_json=as_json))


def delete(
    study: Annotated[
        str, typer.Argument(help="Study Instance UID, or the beginning of it; whole where it was removed before.")
    ],
    reason: Annotated[str, typer.Option(help="Why; kept in the ledger with your name: nothing about the patient.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also where it was not delivered, is held, or a training has it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Delete a study for good: images, results, rows and events; the ledger keeps that one was deleted, not which."""
    from gateway.commands import deletion as command

    raise typer.Exit(command.delete(config, study, reason=reason, force=force, yes=yes, as_json=as_json))


def keep(
    study: Annotated[str | None, typer.Argument(help="Study Instance UID, or the beginning of it.")] = None,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the ledger: nothing about the patient.")] = None,
    lift: Annotated[bool, typer.Option("--lift", help="It may be deleted again.")] = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Put a study under legal hold: neither retention nor `delete` removes it. Without STUDY: list the holds."""
    from gateway.commands import deletion as command

    raise typer.Exit(command.keep(config, study, reason=reason, lift=lift, as_json=as_json))
