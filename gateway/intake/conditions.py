"""Conditions of routing rules: typed tests over attributes, groups of them, and their truth with its reasons.

There is nothing to execute: a condition names an attribute, one of a few operators, and the value to compare with.
Truth has three values. `error` means that a value could not be read; it is never taken for false (RTE-23). A group is
an error only where the unreadable value could change the outcome (Kleene's logic): `all` with one false member is
false, whatever the others are.
"""

from __future__ import annotations

import enum
import ipaddress
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.intake.attribute_values import (
    Image,
    PrivateText,
    SeriesHeaders,
    ValueUnreadable,
    series_fact,
    values_of,
)
from gateway.intake.attributes import DATE, TIME, Attribute

OPERATORS = ("equals", "in", "contains", "starts-with", "matches-glob", "range", "in-network", "exists", "absent")
_TEXT_OPERATORS = frozenset({"contains", "starts-with", "matches-glob"})
_MAX_TEXT = 10_240  # the longest LT; longer values (UT, UC) are not worth an operator's stalled worker
_SHOWN_VALUES = 5
_SHOWN_LENGTH = 64
_REDACTED = "(patient attribute)"


class Truth(enum.StrEnum):
    TRUE = "true"
    FALSE = "false"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One test. `operand` holds the expected values (several for `in`); `minimum` and `maximum` are for `range`.

    `instances` says how many images must satisfy it; `values` how many of the values of one image (ImageType and
    PixelSpacing have several); `value_number` picks one of them, counted from 1 as PS3.5 6.4 does.
    """

    attribute: Attribute
    operator: str
    operand: tuple[str | float, ...] = ()
    minimum: float | str | None = None
    maximum: float | str | None = None
    instances: str = "all"
    values: str = "any"
    value_number: int | None = None
    ignore_case: bool = False


@dataclass(frozen=True, kw_only=True)
class Group:
    """`all`, `any` or `none` of its members, which are conditions or groups."""

    kind: str
    members: tuple[Condition | Group, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The truth of a condition or group over one series, and the explanation as JSON."""

    truth: Truth
    explanation: dict[str, Any]


def evaluate(node: Condition | Group, series: SeriesHeaders, images: Sequence[Image]) -> Evaluated:
    """Judge a condition or group over all images of a series. All members are judged, so that all can be shown."""
    if isinstance(node, Group):
        members = [evaluate(member, series, images) for member in node.members]
        truth = _combine(node.kind, [m.truth for m in members])
        return Evaluated(
            truth=truth,
            explanation={"group": node.kind, "truth": truth.value, "members": [m.explanation for m in members]},
        )
    return _evaluate_condition(node, series, images)


def _combine(kind: str, truths: Sequence[Truth]) -> Truth:
    """`all`, `any` or `none` in three-valued logic."""
    decisive = Truth.FALSE if kind == "all" else Truth.TRUE
    if decisive in truths:
        return Truth.TRUE if kind == "any" else Truth.FALSE
    if Truth.ERROR in truths:
        return Truth.ERROR
    return Truth.FALSE if kind == "any" else Truth.TRUE


def _evaluate_condition(condition: Condition, series: SeriesHeaders, images: Sequence[Image]) -> Evaluated:
    attribute = condition.attribute
    truths: list[Truth] = []
    seen: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    absent = 0
    if attribute.per_series and attribute.fact is not None:
        readings: Sequence[Image | None] = (None,)
    else:
        readings = images
    for image in readings:
        try:
            if image is None:
                values = series_fact(series, str(attribute.fact), len(images))
            else:
                values = values_of(image, attribute)
            truths.append(Truth.TRUE if _holds(condition, values) else Truth.FALSE)
        except ValueUnreadable as error:
            truths.append(Truth.ERROR)
            errors[str(error)] += 1
            continue
        if values:
            seen["\\".join(_shown(v, attribute) for v in values[:16]) + ("\\..." if len(values) > 16 else "")] += 1
        else:
            absent += 1
    truth = _combine(condition.instances, truths) if truths else Truth.ERROR
    explanation: dict[str, Any] = {
        "condition": describe(condition),
        "truth": truth.value,
        "images": len(truths),
        "satisfied": truths.count(Truth.TRUE),
        "values": _summary(seen, redact=attribute.identifying),
    }
    if absent:
        explanation["absent"] = absent
    if not truths:
        explanation["error"] = "the series has no image"
    elif errors:
        explanation["error"] = "; ".join(f"{text} (images: {count})" for text, count in errors.most_common(3))
    return Evaluated(truth=truth, explanation=explanation)


def _summary(seen: Counter[str], *, redact: bool) -> list[dict[str, Any]]:
    """The distinct values with the number of images that have them, most frequent first, cut to a size."""
    if redact:
        return [{"value": _REDACTED, "count": sum(seen.values()), "distinct": len(seen)}] if seen else []
    shown: list[dict[str, Any]] = [{"value": v, "count": n} for v, n in seen.most_common(_SHOWN_VALUES)]
    if len(seen) > _SHOWN_VALUES:
        rest = sum(seen.values()) - sum(entry["count"] for entry in shown)
        shown.append({"value": f"({len(seen) - _SHOWN_VALUES} other values)", "count": rest})
    return shown


def _shown(value: Any, attribute: Attribute) -> str:
    if attribute.kind == TIME:
        return _clock(value)
    if isinstance(value, PrivateText):
        return f"(private text, {len(value)} characters)"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: _SHOWN_LENGTH + 1])
    return clean if len(clean) <= _SHOWN_LENGTH else clean[: _SHOWN_LENGTH - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def describe(condition: Condition) -> str:
    """The condition in one line, as `seggate show` prints it; values expected of patient attributes are hidden."""
    attribute = condition.attribute
    name = attribute.name + (f" value {condition.value_number}" if condition.value_number else "")
    if condition.operator == "range":
        ends = [
            f"{word} {_end(end, attribute)}"
            for word, end in (("at least", condition.minimum), ("at most", condition.maximum))
            if end is not None
        ]
        text = f"{name} {' and '.join(ends)}"
    elif condition.operator in {"exists", "absent"}:
        text = f"{name} {condition.operator}"
    else:
        operands = ", ".join(repr(o) if isinstance(o, str) else f"{o:g}" for o in condition.operand)
        text = f"{name} {condition.operator} {operands}"
    if attribute.identifying and condition.operator not in {"exists", "absent"}:
        text = f"{name} {condition.operator} {_REDACTED}"
    if condition.values == "all":
        text += ", every value"
    return text if attribute.per_series else f"{text} ({condition.instances} images)"


def _end(end: float | str, attribute: Attribute) -> str:
    if attribute.kind == TIME:
        return _clock(float(end))
    return f"{end:g}" if isinstance(end, float) else str(end)


def _holds(condition: Condition, values: Sequence[Any]) -> bool:
    """Whether one image satisfies the condition; raises ValueUnreadable for values too long to be tested."""
    if condition.value_number is not None:
        values = values[condition.value_number - 1 : condition.value_number]
    if condition.operator == "exists":
        return bool(values)
    if condition.operator == "absent":
        return not values
    if not values:
        return False
    judged = (_value_holds(condition, value) for value in values)
    return all(judged) if condition.values == "all" else any(judged)


def _value_holds(condition: Condition, value: Any) -> bool:
    if condition.operator == "range":
        return _in_range(condition, value)
    if condition.operator == "in-network":
        return _in_network(condition, str(value))
    if isinstance(value, float):
        return any(math.isclose(value, float(o), rel_tol=1e-6, abs_tol=1e-9) for o in condition.operand)
    text = str(value)
    if len(text) > _MAX_TEXT:
        raise ValueUnreadable(f"{condition.attribute.name} is longer than {_MAX_TEXT} characters")
    operands = [str(o) for o in condition.operand]
    if condition.ignore_case:
        text, operands = text.casefold(), [o.casefold() for o in operands]
    if condition.operator in {"equals", "in"}:
        return text in operands
    test = {"contains": _contains, "starts-with": _starts_with, "matches-glob": matches_glob}[condition.operator]
    return any(test(text, operand) for operand in operands)


def _contains(text: str, part: str) -> bool:
    return part in text


def _starts_with(text: str, start: str) -> bool:
    return text.startswith(start)


def _in_range(condition: Condition, value: Any) -> bool:
    low, high = condition.minimum, condition.maximum
    if condition.attribute.kind == DATE:
        return (low is None or str(value) >= str(low)) and (high is None or str(value) <= str(high))
    above = low is None or float(value) >= float(low)
    below = high is None or float(value) <= float(high)
    if condition.attribute.kind == TIME and low is not None and high is not None and float(low) > float(high):
        return above or below  # a window over midnight: 22:00 to 06:00
    return above and below


def _in_network(condition: Condition, value: str) -> bool:
    try:
        address = ipaddress.ip_address(value.split("%", 1)[0])
    except ValueError as error:
        raise ValueUnreadable(f"{condition.attribute.name} is not an IP address") from error
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return any(address in ipaddress.ip_network(str(network), strict=False) for network in condition.operand)


def matches_glob(text: str, pattern: str) -> bool:
    """`*` stands for any run of characters, `?` for one; all else is literal. Cost is at most length times length.

    Not a regular expression on purpose: values come from the network, and no pattern may take exponential time.
    """
    position = index = 0
    star, resume = -1, 0
    while position < len(text):
        if index < len(pattern) and pattern[index] == "*":
            star, resume = index, position
            index += 1
        elif index < len(pattern) and pattern[index] in ("?", text[position]):
            position, index = position + 1, index + 1
        elif star >= 0:
            resume += 1
            position, index = resume, star + 1
        else:
            return False
    return all(c == "*" for c in pattern[index:])


def operators_for(attribute: Attribute) -> frozenset[str]:
    """The operators that fit the kind of an attribute's values."""
    always = {"exists", "absent"}
    if attribute.fact == "PeerAddress":
        return frozenset(always | {"equals", "in", "in-network"})
    return frozenset(
        always
        | {
            "text": {"equals", "in"} | _TEXT_OPERATORS,
            "number": {"equals", "in", "range"},
            "date": {"equals", "in", "range"},
            "time": {"range"},
            "age": {"range"},
            "weekday": {"equals", "in"},
        }[attribute.kind]
    )
