"""`seggate config show`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gateway.commands.output import console, print_json
from gateway.settings import FILES, load_settings, variables

_PASSWORD_IN_URL = re.compile(r"(://[^:/@\s]+):[^@\s]+@")


def show(config: Path, *, as_json: bool) -> int:
    """Everything in force, defaults included; a password inside a URL is hidden, secret files are only named."""
    settings = load_settings(config)
    document = {
        "folder": str(settings.folder),
        "files": {n: str(settings.folder / n) for n in FILES if (settings.folder / n).is_file()},
        "environment": sorted(variables()),
        "state_dir": str(settings.state_dir),
        "spool_dir": str(settings.spool_dir),
        "models_dir": str(settings.models_dir),
        "routes_file": str(settings.routes_file),
        "gateway": _hidden(settings.gateway.model_dump(mode="json")),
        "destinations": _hidden(settings.destinations.model_dump(mode="json")),
        "learning": settings.learning.model_dump(mode="json"),
        "logging": settings.logging.model_dump(mode="json"),
    }
    if as_json:
        print_json(document)
    else:
        for line in _lines("", document):
            console().print(line, markup=False)
    return 0


def _hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _hidden(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_hidden(v) for v in value]
    return _PASSWORD_IN_URL.sub(r"\1:***@", value) if isinstance(value, str) else value


def _lines(prefix: str, value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        return [line for k, v in value.items() for line in _lines(f"{prefix}.{k}" if prefix else str(k), v)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [line for n, v in enumerate(value) for line in _lines(f"{prefix}[{n}]", v)]
    return [f"{prefix} = {value!r}"]
