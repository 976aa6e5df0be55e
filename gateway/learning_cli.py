"""Options of `seggate learn`: what models learn from, and what comes of it."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from gateway.command_options import DEFAULT_CONFIG, Config, Json

Run = Annotated[str, typer.Argument(help="A training's id, or the beginning of it, as `seggate learn list` shows it.")]

learn = typer.Typer(help="What models learn from the studies they serve.", no_args_is_help=True, rich_markup_mode=None)


@learn.command("cases")
def learn_cases(
    model: Annotated[str, typer.Argument(help="A model's name.")],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """List the studies that a model is to learn from next: why each was chosen, and which wait for a reader."""
    from gateway.commands import learn as command

    raise typer.Exit(command.cases(config, model, as_json=as_json))


@learn.command("start")
def learn_start(
    model: Annotated[str, typer.Argument(help="A model's name.")],
    full: Annotated[bool, typer.Option("--full", help="Train from the beginning, with old and new cases.")] = False,
    reason: Annotated[str, typer.Option(help="Why; part of the ledger.")] = "asked for by a person",
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Ask for a fine-tuning with the labelled cases; without enough of them it waits for readers. It ends in a
    candidate, never in production."""
    from gateway.commands import training_runs as command

    kind: Literal["fine-tuning", "retraining"] = "retraining" if full else "fine-tuning"
    raise typer.Exit(command.start(config, model, kind=kind, reason=reason, as_json=as_json))


@learn.command("list")
def learn_list(
    model: Annotated[str | None, typer.Argument(help="A model's name. Default: all.")] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """List trainings, the newest first: what waits, trains, is tested, was promoted or refused, and why."""
    from gateway.commands import training_runs as command

    raise typer.Exit(command.list_(config, model, as_json=as_json))


@learn.command("show")
def learn_show(run: Run, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Show one training: its cases, its folds, and where its logs are."""
    from gateway.commands import training_runs as command

    raise typer.Exit(command.show(config, run, as_json=as_json))


@learn.command("retry")
def learn_retry(run: Run, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Let a training that has failed go on; what is trained stays."""
    from gateway.commands import training_runs as command

    raise typer.Exit(command.retry(config, run, as_json=as_json))


@learn.command("stop")
def learn_stop(
    run: Run,
    reason: Annotated[str, typer.Option(help="Why; part of the ledger.")] = "no longer wanted",
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Give a training up. A fold that trains ends within seconds, after a checkpoint."""
    from gateway.commands import training_runs as command

    raise typer.Exit(command.stop(config, run, reason=reason, as_json=as_json))
