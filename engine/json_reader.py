"""Reading JSON that strangers wrote: every value is checked for type, length and range, and an error names the key.

Used for plans, dataset.json, cards and bundles. Nothing here knows what the values mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

MAX_JSON_BYTES = 64 * 2**20
MAX_TEXT = 10_000
T = TypeVar("T")


def parse_json(data: bytes, *, where: str, error: type[Exception]) -> dict[str, Any]:
    """One JSON object from UTF-8 bytes; NaN, Infinity, repeated keys and endless nesting raise `error`."""
    if len(data) > MAX_JSON_BYTES:
        raise error(f"{where}: {len(data)} bytes; at most {MAX_JSON_BYTES} are read")

    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is not a JSON number")

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"key {key[:64]!r} appears twice")
            found[key] = value
        return found

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=no_repeats)
    except (ValueError, RecursionError) as exc:
        raise error(f"{where}: not readable as JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise error(f"{where}: a JSON object is needed, found {type(value).__name__}")
    return value


def read_json(path: Path, *, error: type[Exception]) -> dict[str, Any]:
    """One JSON object from a file. Absent, too large or malformed raises `error` with the file's name."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise error(f"{path.name}: larger than {MAX_JSON_BYTES} bytes")
        data = path.read_bytes()
    except OSError as exc:
        raise error(f"{path.name}: cannot be read: {exc.strerror}") from exc
    return parse_json(data, where=path.name, error=error)


class Reader:
    """A JSON object with its place in the file. Every method raises the error class given at construction.

    An absent key is an error unless a default is passed; a key that is present is checked in any case.
    """

    _REQUIRED: Any = object()

    def __init__(self, value: object, *, where: str, error: type[Exception]) -> None:
        if not isinstance(value, Mapping):
            raise error(f"{where}: an object is needed, found {_kind(value)}")
        self._value: Mapping[str, Any] = value
        self.where = where
        self.error = error

    def __contains__(self, key: str) -> bool:
        return key in self._value

    def keys(self) -> Iterator[str]:
        """The keys in the order of the file; each is checked to be text."""
        for key in self._value:
            if not isinstance(key, str) or len(key) > MAX_TEXT:
                raise self.error(f"{self.where}: a key is not a text of reasonable length")
            yield key

    def fail(self, key: str, problem: str) -> Exception:
        """The error to raise for `key`; the caller raises it."""
        return self.error(f"{self.where}: {key}: {problem}")

    def raw(self, key: str, default: object = _REQUIRED) -> Any:
        """The unchecked value."""
        if key in self._value:
            return self._value[key]
        if default is self._REQUIRED:
            raise self.error(f"{self.where}: {key} is missing")
        return default

    def only(self, allowed: frozenset[str]) -> None:
        """Raise for any key outside `allowed`."""
        unknown = sorted(set(self.keys()) - allowed)
        if unknown:
            raise self.error(f"{self.where}: unknown key {unknown[0][:64]!r}; known: {', '.join(sorted(allowed))}")

    def text(self, key: str, default: object = _REQUIRED, *, empty: bool = False) -> str:
        return self.check_text(key, self.raw(key, default), empty=empty)

    def text_or_none(self, key: str) -> str | None:
        value = self.raw(key, None)
        return None if value is None else self.check_text(key, value)

    def check_text(self, key: str, value: object, *, empty: bool = False) -> str:
        if not isinstance(value, str) or len(value) > MAX_TEXT or "\x00" in value or (not value and not empty):
            raise self.fail(key, f"a text of at most {MAX_TEXT} characters is needed, found {_kind(value)}")
        return value

    def boolean(self, key: str, default: object = _REQUIRED) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, f"true or false is needed, found {_kind(value)}")
        return value

    def integer(self, key: str, low: int, high: int, default: object = _REQUIRED) -> int:
        return self.check_integer(key, self.raw(key, default), low, high)

    def check_integer(self, key: str, value: object, low: int, high: int) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fail(key, f"a whole number is needed, found {_kind(value)}")
        if not low <= value <= high:
            raise self.fail(key, f"{_short(value)} is outside {low}..{high}")
        return value

    def number(self, key: str, low: float, high: float, default: object = _REQUIRED) -> float:
        return self.check_number(key, self.raw(key, default), low, high)

    def check_number(self, key: str, value: object, low: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"a number is needed, found {_kind(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.fail(key, f"{value} is not a finite number")
        if not low <= value <= high:
            raise self.fail(key, f"{_short(value)} is outside {low}..{high}")
        return float(value)

    def array(self, key: str, *, lengths: tuple[int, int], default: object = _REQUIRED) -> list[Any]:
        """A list with at least lengths[0] and at most lengths[1] entries, entries unchecked."""
        value = self.raw(key, default)
        if not isinstance(value, list | tuple):
            raise self.fail(key, f"a list is needed, found {_kind(value)}")
        if not lengths[0] <= len(value) <= lengths[1]:
            raise self.fail(key, f"{len(value)} entries; {lengths[0]} to {lengths[1]} are possible")
        return list(value)

    def integers(
        self, key: str, low: int, high: int, *, lengths: tuple[int, int], default: object = _REQUIRED
    ) -> tuple[int, ...]:
        entries = self.array(key, lengths=lengths, default=default)
        return tuple(self.check_integer(f"{key}[{i}]", v, low, high) for i, v in enumerate(entries))

    def numbers(
        self, key: str, low: float, high: float, *, lengths: tuple[int, int], default: object = _REQUIRED
    ) -> tuple[float, ...]:
        entries = self.array(key, lengths=lengths, default=default)
        return tuple(self.check_number(f"{key}[{i}]", v, low, high) for i, v in enumerate(entries))

    def texts(self, key: str, *, lengths: tuple[int, int], default: object = _REQUIRED) -> tuple[str, ...]:
        entries = self.array(key, lengths=lengths, default=default)
        return tuple(self.check_text(f"{key}[{i}]", v) for i, v in enumerate(entries))

    def look_up(self, key: str, name: str, table: Mapping[str, T]) -> T:
        """The entry of `table` for the text `name` that stands at `key`."""
        if name not in table:
            raise self.fail(key, f"{name[:120]!r} is not supported; known: {', '.join(table)}")
        return table[name]

    def child(self, key: str, default: object = _REQUIRED) -> Reader:
        return Reader(self.raw(key, default), where=f"{self.where}: {key}", error=self.error)

    def children(self, key: str, *, lengths: tuple[int, int], default: object = _REQUIRED) -> list[Reader]:
        entries = self.array(key, lengths=lengths, default=default)
        return [Reader(v, where=f"{self.where}: {key}[{i}]", error=self.error) for i, v in enumerate(entries)]


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"text of {len(value)} characters"
    return type(value).__name__


def _short(value: float) -> str:
    """A number for a message; whole numbers of absurd length are not printed in full."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return f"a number with {value.bit_length()} bits"
    return str(value)
