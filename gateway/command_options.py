"""Options that many commands have, described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_CONFIG_HELP = "Folder with gateway.toml, routes.toml, destinations.toml, learning.toml, logging.toml."
Config = Annotated[Path, typer.Option("--config", envvar="SEGGATE_CONFIG", help=_CONFIG_HELP, show_default=True)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table, for scripts.")]
DEFAULT_CONFIG = Path("config")
