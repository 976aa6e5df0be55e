"""Commands of what watches the models: `seggate tasks …`, `canary`, `models pause` and `resume` (gateway/cli.py)."""

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


def models_pause(
    name: Annotated[str, typer.Argument(help="A model's name.")],
    reason: Annotated[str, typer.Option(help="Why; the ledger keeps it, and each study that waits says it.")],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Run a model on no new study; what is ordered meanwhile waits until `resume`."""
    from gateway.commands import model_pause as command

    raise typer.Exit(command.pause_model(config, name, reason=reason, as_json=as_json))


def models_resume(
    name: Annotated[str, typer.Argument(help="A model's name.")],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Let a paused model run again, on everything that waits for it too."""
    from gateway.commands import model_pause as command

    raise typer.Exit(command.resume_model(config, name, as_json=as_json))


def canary(
    model: Annotated[str | None, typer.Argument(help="A model's name. Default: every model that serves.")] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Send a synthetic study of each model the real way now, and wait for what comes of it; nothing leaves the
    gateway."""
    from gateway.commands import canary as command

    raise typer.Exit(command.canary(config, model, as_json=as_json))
