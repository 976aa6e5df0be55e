"""What is wrong with the configuration, in words: where a value came from, its key, and what to write instead."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError

PREFIX, DELIMITER = "SEGGATE_", "__"
# Read elsewhere: by the command line, by gateway/heartbeat.py, by tests and benchmarks.
_NO_SETTINGS = frozenset(
    {"SEGGATE_CONFIG", "SEGGATE_EXECUTOR", "SEGGATE_LAUNCHER", "SEGGATE_SHARED", "SEGGATE_REQUIRE_PEERS"}
)
# What Kubernetes sets in every container beside a Service named seggate.
_OF_KUBERNETES = re.compile(r"SEGGATE_(?:\w+_)?(?:SERVICE_(?:HOST|PORT\w*)|PORT(?:_\d+_(?:TCP|UDP)\w*)?)")
_FIELD = re.compile(r'field "(\w+)"')

Location = tuple[int | str, ...]


def faults(error: ValidationError, kind: type[BaseModel], source: str, variables: Collection[str]) -> list[str]:
    """A line for each fault. `source` is the file; `variables` are the environment's, which win over it."""
    return [_fault(fault["loc"], _words(dict(fault)), kind, source, variables) for fault in error.errors()]


def unreadable_variable(error: SettingsError, variables: Collection[str]) -> str:
    """The line for a list or table in the environment that is no JSON; pydantic names only its section."""
    found = _FIELD.search(str(error))
    section = f"{PREFIX}{found[1].upper()}" if found else PREFIX
    names = " or ".join(sorted(v for v in variables if v.upper() == section or v.upper().startswith(section + "_")))
    return f"environment variable {names or section}: not valid JSON, which a list or table needs"


def unknown_variables(kind: type[BaseModel], variables: Collection[str], secrets: Collection[str]) -> list[str]:
    """A line for each `SEGGATE_…` that nothing reads. `secrets` are names that the settings themselves give."""
    lines = []
    for name in sorted(set(variables) - _NO_SETTINGS - set(secrets)):
        section = name.upper().removeprefix(PREFIX).split(DELIMITER)[0].lower()
        injected = DELIMITER not in name and _OF_KUBERNETES.fullmatch(name)
        if section not in kind.model_fields and not injected:
            suggestion = _suggestion(kind, (section,), PREFIX)
            lines.append(f"environment variable {name}: no setting has this name{suggestion}")
    return lines


def _fault(loc: Location, words: str, kind: type[BaseModel], source: str, variables: Collection[str]) -> str:
    names = [str(part) for part in loc]
    set_at = {tuple(v.upper().removeprefix(PREFIX).lower().split(DELIMITER)): v for v in variables}
    for length in range(len(names), 0, -1):
        if variable := set_at.get(tuple(names[:length])):
            rest = f"{location(loc[length:])}: " if loc[length:] else ""
            words = words or f"unknown{_suggestion(kind, loc, PREFIX if not rest else '')}"
            return f"environment variable {variable}: {rest}{words}"
    below = sorted(variable for path, variable in set_at.items() if list(path[: len(names)]) == names)
    beside = f" (with {', '.join(below)} from the environment)" if below else ""
    return f"{source}: {location(loc)}: {words or 'unknown key' + _suggestion(kind, loc, '')}{beside}"


def location(loc: Location) -> str:
    """("senders", 1, "ae_title") as senders[1].ae_title."""
    return re.sub(r"\.\[", "[", ".".join(f"[{p}]" if isinstance(p, int) else p for p in loc)) or "(file)"


def _words(fault: dict[str, Any]) -> str:
    """What is wrong with the value; empty where the key itself is unknown."""
    if fault["type"] == "extra_forbidden":
        return ""
    return str(fault["ctx"]["error"]) if fault["type"] == "value_error" else str(fault["msg"])


def _suggestion(kind: type[BaseModel], loc: Sequence[int | str], prefix: str) -> str:
    """ "; did you mean …?" with a key of the same table, in the shape of a variable where a prefix is given."""
    table: type[BaseModel] | None = kind
    for part in loc[:-1]:
        if isinstance(part, str):
            field = table.model_fields.get(part) if table is not None else None
            table = _model_in(field.annotation) if field is not None else None
    close = difflib.get_close_matches(str(loc[-1]), table.model_fields, n=1) if table is not None else []
    if not close:
        return ""
    if prefix:
        return f"; did you mean {prefix}{DELIMITER.join([*map(str, loc[:-1]), close[0]]).upper()}?"
    return f"; did you mean {close[0]}?"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model of `Model`, `Model | None` or `tuple[Model, ...]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)
