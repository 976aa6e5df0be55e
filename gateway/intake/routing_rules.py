"""The language of `routes.toml`: text in, checked rules out.

Everything is checked when the file is read: unknown keys, attributes, operators and types are refused, all of them at
once, each with file, line and rule. Nothing in the file can call, loop or touch a file system.
"""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo

from gateway.intake.attribute_values import ValueUnreadable, date_text, seconds_of_day
from gateway.intake.attributes import (
    AGE,
    DATE,
    NUMBER,
    TIME,
    WEEKDAY,
    WEEKDAYS,
    Attribute,
    AttributeUnknown,
    parse_attribute,
)
from gateway.intake.conditions import OPERATORS, Condition, Group, operators_for

_MAX_TEXT = 1 << 20
_MAX_RULES = 500
_MAX_DEPTH = 8
_MAX_MEMBERS = 200
_MAX_PATTERN = 256
_NAME = re.compile(r"^[a-z0-9][a-z0-9-]{0,62}$")
_RULE_KEYS = ("name", "description", "model", "enabled", "priority", "stop", "when")
_CONDITION_KEYS = (
    "attribute", "op", "value", "min", "max", "instances", "values", "value_number", "case", "vr",
)  # fmt: skip
_GROUP_KINDS = ("all", "any", "none")


class RulesInvalid(Exception):
    """A routes file cannot be used. One line per fault: file:line, rule, what is wrong and what is expected."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Sends a series to a model when `when` is true; without a model (and with `stop`) it keeps a series out."""

    name: str
    description: str
    model: str | None
    enabled: bool
    priority: str  # routine | urgent
    stop: bool  # where this rule is true, the rules after it are not asked for that series
    when: Group


@dataclass(frozen=True, kw_only=True)
class RuleSet:
    """A valid routes file. `digest` is the SHA-256 of its text and is what past decisions refer to."""

    digest: str
    text: str
    time_zone: str
    rules: tuple[Rule, ...]


class _Faults:
    """Collects every fault of a file, so that one reading finds them all."""

    def __init__(self, source: str, text: str) -> None:
        self.source = source
        self.found: list[str] = []
        self._lines = text.splitlines()
        self._starts = [n for n, line in enumerate(self._lines, 1) if re.match(r"\s*\[\[\s*rules\s*\]\]", line)]

    def add(self, message: str, *, rule: int | None = None, label: str = "", near: str = "") -> None:
        """`near` is a piece of text of the faulty line; the first line of the rule is named where it is not found."""
        first = self._starts[rule] if rule is not None and rule < len(self._starts) else 1
        last = len(self._lines)
        if rule is not None and rule + 1 < len(self._starts):
            last = self._starts[rule + 1] - 1
        line = next((n for n in range(first, last + 1) if near and near in self._lines[n - 1]), first)
        place = f"{self.source}:{line}: "
        self.found.append(place + (f"{label}: {message}" if label else message))


def parse_rules(text: str, *, source: str = "routes.toml") -> RuleSet:
    """Read and check a routes file. Whether a model is registered is no matter of the file: it may be imported later.

    Raises RulesInvalid with every fault found.
    """
    if len(text) > _MAX_TEXT:
        raise RulesInvalid(f"{source}:1: longer than {_MAX_TEXT} characters")
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RulesInvalid(f"{source}: not valid TOML: {error}") from error
    faults = _Faults(source, text)
    _unknown_keys(table, ("time_zone", "rules"), faults)
    time_zone = _time_zone(table, faults)
    entries = table.get("rules", [])
    if not isinstance(entries, list) or len(entries) > _MAX_RULES:
        faults.add(f"rules: expected at most {_MAX_RULES} [[rules]] tables", near="rules")
        entries = []
    rules: list[Rule] = []
    names: set[str] = set()
    for index, entry in enumerate(entries):
        reader = _RuleReader(faults, index, entry)
        rule = reader.read()
        if rule is None:
            continue
        if rule.name in names:
            reader.fault(f"another rule is already called {rule.name!r}", near=rule.name)
        names.add(rule.name)
        rules.append(rule)
    if faults.found:
        raise RulesInvalid("\n".join(faults.found))
    return RuleSet(digest=hashlib.sha256(text.encode()).hexdigest(), text=text, time_zone=time_zone, rules=tuple(rules))


def _unknown_keys(table: Mapping[str, Any], known: tuple[str, ...], faults: _Faults) -> None:
    for key in table:
        if key not in known:
            faults.add(f"unknown key {key!r}{_nearest(key, known)}", near=key)


def _time_zone(table: Mapping[str, Any], faults: _Faults) -> str:
    zone = table.get("time_zone", "UTC")
    try:
        if not isinstance(zone, str):
            raise ValueError("not text")
        ZoneInfo(zone)
    except (ValueError, OSError, KeyError):
        faults.add(
            f"time_zone: {zone!r} is not a zone of the IANA database, for example Europe/Zurich", near="time_zone"
        )
        return "UTC"
    return zone


def _nearest(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"


class _RuleReader:
    """Reads one [[rules]] table and reports its faults with the rule's place in the file."""

    def __init__(self, faults: _Faults, index: int, entry: Any) -> None:
        self._faults = faults
        self._index = index
        self._entry = entry
        name = entry.get("name") if isinstance(entry, dict) else None
        self._label = f"rule {name!r}" if isinstance(name, str) else f"rules[{index}]"

    def fault(self, message: str, *, near: str = "", where: str = "") -> None:
        label = f"{self._label}, {where}" if where else self._label
        self._faults.add(message, rule=self._index, label=label, near=near)

    def read(self) -> Rule | None:
        entry, before = self._entry, len(self._faults.found)
        if not isinstance(entry, dict):
            self.fault("expected a [[rules]] table")
            return None
        for key in entry:
            if key not in _RULE_KEYS:
                self.fault(f"unknown key {key!r}{_nearest(key, _RULE_KEYS)}", near=key)
        name = self._typed("name", str, "")
        if not _NAME.match(name):
            self.fault("name: expected 1 to 63 lower-case letters, digits and hyphens", near="name")
        model = self._typed("model", str, "") or None
        stop = self._typed("stop", bool, False)
        self._check_model(model, stop)
        priority = self._typed("priority", str, "routine")
        if priority not in {"routine", "urgent"}:
            self.fault(f"priority: {priority!r} is neither 'routine' nor 'urgent'", near="priority")
        description = self._typed("description", str, "")
        enabled = self._typed("enabled", bool, True)
        when = entry.get("when")
        group = None
        if isinstance(when, dict) and when:
            group = self._group(when, "when", 1)
        else:
            self.fault("needs a [rules.when] table with all, any or none", near="when")
        if group is None or len(self._faults.found) > before:
            return None
        return Rule(
            name=name, description=description, model=model, enabled=enabled, priority=priority, stop=stop, when=group
        )

    def _typed(self, key: str, kind: type[Any], default: Any) -> Any:
        value = self._entry.get(key, default)
        if type(value) is not kind:
            word = {str: "text in quotes", bool: "true or false"}[kind]
            self.fault(f"{key}: expected {word}", near=key)
            return default
        return value

    def _check_model(self, model: str | None, stop: bool) -> None:
        if model is None:
            if not stop:
                self.fault('needs model = "..."; a rule without a model must say stop = true (it keeps series out)')
        elif not _NAME.match(model):
            self.fault("model: expected 1 to 63 lower-case letters, digits and hyphens", near="model")

    def _group(self, table: Mapping[str, Any], where: str, depth: int) -> Group | None:
        """A table with `all`, `any`, `none`; several of them in one table must all hold."""
        if depth > _MAX_DEPTH:
            self.fault(f"groups are nested deeper than {_MAX_DEPTH}", where=where)
            return None
        groups: list[Group] = []
        for kind, members in table.items():
            if kind not in _GROUP_KINDS:
                self.fault(f"unknown key {kind!r}{_nearest(kind, _GROUP_KINDS)}", near=kind, where=where)
            elif not isinstance(members, list) or not 1 <= len(members) <= _MAX_MEMBERS:
                self.fault(f"{kind}: expected a list of 1 to {_MAX_MEMBERS} conditions", near=kind, where=where)
            else:
                read = [self._member(m, f"{where}.{kind}[{i}]", depth) for i, m in enumerate(members)]
                groups.append(Group(kind=kind, members=tuple(m for m in read if m is not None)))
        if len(groups) == 1:
            return groups[0]
        return Group(kind="all", members=tuple(groups)) if groups else None

    def _member(self, member: Any, where: str, depth: int) -> Condition | Group | None:
        if not isinstance(member, dict):
            self.fault("expected { attribute = ..., op = ... } or a group", where=where)
            return None
        if "attribute" in member or "op" in member:
            return self._condition(member, where)
        return self._group(member, where, depth + 1)

    def _condition(self, table: Mapping[str, Any], where: str) -> Condition | None:
        name = table.get("attribute")
        near = name if isinstance(name, str) else ""
        before = len(self._faults.found)
        for key in table:
            if key not in _CONDITION_KEYS:
                self.fault(f"unknown key {key!r}{_nearest(key, _CONDITION_KEYS)}", near=near, where=where)
        attribute = self._attribute(name, table.get("vr"), where)
        operator = table.get("op")
        if operator not in OPERATORS:
            hint = _nearest(str(operator), OPERATORS)
            self.fault(f"unknown op {operator!r}{hint}", near=near, where=where)
        elif attribute is not None and operator not in operators_for(attribute):
            fitting = ", ".join(o for o in OPERATORS if o in operators_for(attribute))
            self.fault(
                f"op {operator!r} does not fit {attribute.name} ({attribute.kind}); these do: {fitting}",
                near=near,
                where=where,
            )
        options = {
            "instances": self._choice(table, "instances", _GROUP_KINDS, "all", near, where),
            "values": self._choice(table, "values", ("any", "all"), "any", near, where),
            "case": self._choice(table, "case", ("match", "ignore"), "match", near, where),
        }
        number = table.get("value_number")
        if number is not None and (type(number) is not int or not 1 <= number <= 65535):
            self.fault("value_number: expected 1, 2, 3, ...", near=near, where=where)
        if attribute is None or len(self._faults.found) > before:
            return None
        if attribute.per_series and ("instances" in table or number is not None):
            self.fault(
                f"{attribute.name} has one value for the series; leave out instances and value_number",
                near=near,
                where=where,
            )
        try:
            operand, low, high = _operands(table, attribute, str(operator))
        except ValueError as error:
            self.fault(str(error), near=near, where=where)
            return None
        return Condition(
            attribute=attribute,
            operator=str(operator),
            operand=operand,
            minimum=low,
            maximum=high,
            instances=options["instances"],
            values=options["values"],
            value_number=number,
            ignore_case=options["case"] == "ignore",
        )

    def _attribute(self, name: Any, vr: Any, where: str) -> Attribute | None:
        if not isinstance(name, str) or not (vr is None or isinstance(vr, str)):
            self.fault("attribute and vr: expected text in quotes", where=where)
            return None
        try:
            return parse_attribute(name, vr)
        except AttributeUnknown as error:
            self.fault(str(error), near=name, where=where)
            return None

    def _choice(
        self, table: Mapping[str, Any], key: str, choices: tuple[str, ...], default: str, near: str, where: str
    ) -> str:
        value = table.get(key, default)
        if value not in choices:
            self.fault(f"{key}: {value!r} is not one of {', '.join(choices)}", near=near, where=where)
            return default
        return str(value)


_Operands = tuple[tuple[str | float, ...], float | str | None, float | str | None]


def _operands(table: Mapping[str, Any], attribute: Attribute, operator: str) -> _Operands:
    """The value, or min and max, of a condition, of the attribute's kind; raises ValueError with what is expected."""
    if operator == "range":
        if "value" in table:
            raise ValueError("op 'range' takes min and max, not value")
        low, high = (_bound(table[k], k, attribute) if k in table else None for k in ("min", "max"))
        if low is None and high is None:
            raise ValueError("op 'range' needs min, max or both")
        ordered = attribute.kind != TIME and low is not None and high is not None
        if ordered and (str(low) > str(high) if attribute.kind == DATE else float(low or 0) > float(high or 0)):
            raise ValueError("min is larger than max; nothing could match")
        return (), low, high
    if "min" in table or "max" in table:
        raise ValueError(f"min and max belong to op 'range', not to {operator!r}")
    if operator in {"exists", "absent"}:
        if "value" in table:
            raise ValueError(f"op {operator!r} takes no value")
        return (), None, None
    if "value" not in table:
        raise ValueError(f"op {operator!r} needs a value")
    value = table["value"]
    listed = operator in {"in", "in-network"}
    if isinstance(value, list) and not listed:
        raise ValueError(f"op {operator!r} takes one value; use 'in' for several")
    if operator == "in" and not (isinstance(value, list) and value):
        raise ValueError('op \'in\' takes a list, as in value = ["CT", "MR"]')
    entries = value if isinstance(value, list) else [value]
    return tuple(_operand(entry, attribute, operator) for entry in entries), None, None


def _operand(entry: Any, attribute: Attribute, operator: str) -> str | float:
    if attribute.kind == NUMBER:
        return _finite(entry, "value")
    if not isinstance(entry, str) or not entry:
        raise ValueError(f"value: expected text in quotes ({attribute.name} is {attribute.kind})")
    if len(entry) > _MAX_PATTERN:
        raise ValueError(f"value: longer than {_MAX_PATTERN} characters")
    if operator == "in-network":
        try:
            return str(ipaddress.ip_network(entry, strict=False))
        except ValueError as error:
            raise ValueError(f"value: {entry!r} is neither an IP address nor a network") from error
    if attribute.kind == WEEKDAY and entry not in WEEKDAYS:
        raise ValueError(f"value: {entry!r} is not one of {', '.join(WEEKDAYS)}")
    if attribute.kind == DATE:
        return str(_bound(entry, "value", attribute))
    if attribute.fact == "SliceOrientation" and operator in {"equals", "in"}:
        known = ("axial", "sagittal", "coronal", "oblique")
        if entry not in known:
            raise ValueError(f"value: {entry!r}{_nearest(entry, known)}")
    return entry


def _bound(entry: Any, key: str, attribute: Attribute) -> float | str:
    if attribute.kind in {NUMBER, AGE}:
        return _finite(entry, key)
    if not isinstance(entry, str):
        form = {DATE: '"2026-01-31"', TIME: '"22:30"'}[attribute.kind]
        raise ValueError(f"{key}: expected text in quotes, as in {key} = {form}")
    try:
        return date_text(entry, key) if attribute.kind == DATE else seconds_of_day(entry, key)
    except ValueUnreadable as error:
        raise ValueError(f"{error}: {entry!r}") from error


def _finite(entry: Any, key: str) -> float:
    if isinstance(entry, bool) or not isinstance(entry, int | float) or not math.isfinite(entry):
        raise ValueError(f"{key}: expected a number")
    return float(entry)
