"""The keys that a commented configuration file documents, commented-out ones included, and the fields behind them."""

from __future__ import annotations

import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel

# `# key = value`, `# [table]`, `# [[table]]`: what a reader would uncomment. Prose has no such shape.
_COMMENTED_OUT = re.compile(r"^# (?=\[?\[[a-z_.]+\]\]?(?:\s|$)|[a-z_]+ = )", re.MULTILINE)


def uncommented(path: Path) -> dict[str, Any]:
    """The file with every commented-out key in force; an error where that is not TOML."""
    return tomllib.loads(_COMMENTED_OUT.sub("", path.read_text(encoding="utf-8")))


def documented_keys(table: dict[str, Any], prefix: str = "") -> set[str]:
    """`section.key` of every key; of a list of tables the keys of all entries."""
    keys: set[str] = set()
    for name, value in table.items():
        inner = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
        tables = [t for t in inner if isinstance(t, dict)]
        if not tables:
            keys.add(f"{prefix}{name}")
        for one in tables:
            keys |= documented_keys(one, f"{prefix}{name}.")
    return keys


def model_keys(model: type[BaseModel], prefix: str = "", seen: tuple[type[BaseModel], ...] = ()) -> set[str]:
    """`section.key` of every field, into nested models, tuples of models and optional models."""
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is None or inner in seen:
            keys.add(f"{prefix}{name}")
        else:
            keys |= model_keys(inner, f"{prefix}{name}.", (*seen, model))
    return keys


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    found = (_model_in(a) for a in typing.get_args(annotation))
    return next((f for f in found if f is not None), None)
