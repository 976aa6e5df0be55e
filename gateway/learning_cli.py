"""Options of `seggate learn`: what models learn from, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gateway.training_cli import Json

CONFIG_HELP = "Folder with gateway.toml, routes.toml, destinations.toml, learning.toml, logging.toml."
Config = Annotated[Path, typer.Option("--config", envvar="SEGGATE_CONFIG", help=CONFIG_HELP, show_default=True)]
DEFAULT_CONFIG = Path("config")

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
