"""Names of structures → labels of the dataset: which are taken, under which name, with which value.

Names are compared without regard to capitals and to repeated spaces. In a pattern `*` stands for any text and `?` for
one character, and several structures of one name in one file are one label only where such a pattern takes them. Values
are 1, 2, ... in the order of the labels, as nnU-Net wants them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.json_reader import Reader, read_json
from gateway.errors import Rejected

BACKGROUND, IGNORE = "background", "ignore"
_MOST_LABELS = 4096
_MOST_PATTERNS = 1000


@dataclass(frozen=True, kw_only=True)
class Label:
    """`patterns` are the names of structures that it is made of; literal: without wildcards."""

    name: str
    patterns: tuple[str, ...]
    literal: bool = False

    def takes(self, structure: str) -> bool:
        name = folded(structure)
        if self.literal:
            return name in self.patterns
        return any(_fits(pattern, name) for pattern in self.patterns)

    def gathers(self, structure: str) -> bool:
        """Whether it takes structures of this name however many there are: a pattern with a wildcard says so, a name
        alone means one structure."""
        name = folded(structure)
        return not self.literal and any(_fits(p, name) for p in self.patterns if "*" in p or "?" in p)


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """The dataset's labels without background; labels[i] has the value i + 1."""

    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        names = [label.name for label in self.labels]
        if not names or len(names) > _MOST_LABELS:
            raise Rejected(f"{len(names)} labels; 1 to {_MOST_LABELS} are possible")
        for name in names:
            if folded(name) == BACKGROUND:
                raise Rejected(f"label {name!r}: is what carries no label, and has the value 0")
            if names.count(name) > 1:
                raise Rejected(f"label {name!r} is given twice; several names of one label are separated by |")
        if IGNORE in names[:-1]:
            raise Rejected("label 'ignore': has the highest value in nnU-Net; list it last")

    @property
    def document(self) -> dict[str, int]:
        """`labels` of dataset.json."""
        return {BACKGROUND: 0, **{label.name: value for value, label in enumerate(self.labels, start=1)}}

    def name(self, value: int) -> str:
        return self.labels[value - 1].name

    def value(self, structure: str) -> int | None:
        """The value of a structure's label, None when it is not taken. Raises Rejected when two labels claim it."""
        claimed = [value for value, label in enumerate(self.labels, start=1) if label.takes(structure)]
        if len(claimed) > 1:
            both = " and ".join(repr(self.name(value)) for value in claimed[:2])
            raise Rejected(f"structure {structure!r} belongs to the labels {both}; make their patterns narrower")
        return claimed[0] if claimed else None


def _fits(pattern: str, name: str) -> bool:
    expression = re.escape(folded(pattern)).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(expression, name, re.DOTALL) is not None


def folded(name: str) -> str:
    return " ".join(name.split()).casefold()


def table_of_words(words: Sequence[str]) -> LabelTable:
    """From NAME or NAME=PATTERN|PATTERN, one for each label. Raises Rejected."""
    labels = []
    for word in words:
        name, equals, patterns = word.partition("=")
        name = " ".join(name.split())
        parts = tuple(part.strip() for part in patterns.split("|") if part.strip()) if equals else (name,)
        if not name or not parts:
            raise Rejected(f"--label {word[:80]!r}: NAME or NAME=PATTERN|PATTERN is needed")
        labels.append(Label(name=name, patterns=parts))
    return LabelTable(labels=tuple(labels))


def table_of_file(path: Path) -> LabelTable:
    """From JSON: {"labels": {NAME: {"value": 1, "names": [PATTERN, ...]}, ...}}; `value` and `names` may be left out:
    the order, and the name itself. Raises Rejected with the key that is at fault."""
    labels = Reader(read_json(path, error=Rejected), where=path.name, error=Rejected).child("labels")
    valued: list[tuple[int, Label]] = []
    for place, name in enumerate(labels.keys(), start=1):
        entry = labels.child(name)
        entry.only(frozenset({"value", "names"}))
        label = Label(name=name, patterns=entry.texts("names", lengths=(1, _MOST_PATTERNS), default=(name,)))
        valued.append((entry.integer("value", 1, _MOST_LABELS, default=place), label))
    valued.sort(key=lambda pair: pair[0])
    if [value for value, _ in valued] != list(range(1, len(valued) + 1)):
        raise Rejected(f"{path.name}: labels: values must be 1, 2, 3, ... without gaps; background is 0 by itself")
    return LabelTable(labels=tuple(label for _, label in valued))


def table_of_names(structures: Iterable[str]) -> LabelTable:
    """A label for every name, sorted (numbers within names by their value), `ignore` last, without background.
    Spellings that differ in capitals and spaces alone are one label, under the first of them. Raises Rejected."""
    spelt: dict[str, str] = {}
    for name in sorted(set(structures)):
        spelt.setdefault(folded(name), name)
    spelt.pop(BACKGROUND, None)
    ordered = sorted(spelt, key=lambda name: (name == IGNORE, _natural(name)))
    return LabelTable(labels=tuple(Label(name=_label_name(spelt[n]), patterns=(n,), literal=True) for n in ordered))


def _label_name(name: str) -> str:
    return IGNORE if folded(name) == IGNORE else name


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]
