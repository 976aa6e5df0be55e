"""`seggate tasks …`: the commands of what watches the models (gateway/cli.py has the others)."""

from __future__ import annotations

from typing import Annotated

import typer

from gateway.command_options import DEFAULT_CONFIG, Config, Json

tasks = typer.Typer(help="What a person is asked to look at.", no_args_is_help=True, rich_markup_mode=None)


@tasks.command("list")
def tasks_list(
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """List open review tasks: what a person is asked to look at."""
    from gateway.commands import tasks as command

    raise typer.Exit(command.list_(config, model=model, as_json=as_json))


@tasks.command("show")
def tasks_show(
    number: Annotated[int, typer.Argument(help="The task's number.")],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Show one task with its example studies and its picture."""
    from gateway.commands import tasks as command

    raise typer.Exit(command.show(config, number, as_json=as_json))


@tasks.command("close")
def tasks_close(
    number: Annotated[int, typer.Argument(help="The task's number.")],
    outcome: Annotated[
        str | None, typer.Option(help="What came of it; the ledger keeps it with who said it: nothing about a patient.")
    ] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Close a task, with what came of it."""
    from gateway.commands import tasks as command

    raise typer.Exit(command.close(config, number, outcome=outcome, as_json=as_json))
