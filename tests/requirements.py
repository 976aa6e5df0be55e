"""Which test proves which requirement: `python -m tests.requirements [--json]` (`make requirements`).

Reads the `@pytest.mark.requirement(...)` marks from the source of the tests without importing them. Ids and their
titles come from the folder `shared` beside the checkout where it is there; an id that is not among them is an error.

Exit codes: 0; 1 when a mark is wrong, an id is unknown, or a promised id has no test.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ID = re.compile(r"(?:CARD|ART|REC|CMP|RTE|QUE|INF|OUT|EMR|REV|OPS)-\d\d")
_SOURCES = ("mission.md", "facts/acceptance-items.md")
_ROW = re.compile(rf"^\| ({ID.pattern}) \| (.+?) \|", re.MULTILINE)  # | ART-01 | what | … |
_ITEM = re.compile(rf"^- \*\*({ID.pattern}) (.+?)\*\*", re.MULTILINE)  # - **REC-01 Title.** …

# What this release promises: each needs at least one test. What stays open of an id is said by its tests.
PROMISED = (
    *("CARD-02", "CARD-04", "ART-13", "ART-14", "ART-17", "ART-25"),
    *("REC-01", "REC-03", "REC-04", "REC-06", "REC-07", "REC-08", "REC-09", "REC-10", "REC-13", "REC-14"),
    *("CMP-15", "CMP-16", "CMP-17", "CMP-18", "CMP-20"),
    *("RTE-21", "RTE-23", "RTE-24", "RTE-25", "RTE-26"),
    *("QUE-27", "QUE-28", "QUE-29"),
    *("INF-35", "INF-36", "INF-37"),
    *("OUT-38", "OUT-39", "OUT-41", "OUT-42", "OUT-44", "OUT-46"),
    *("EMR-47", "EMR-48"),
)


class MarkInvalid(Exception):
    """A requirement mark that cannot be read; the message names file and line."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """One mark of one test: `test` as pytest names it, `open` what the test leaves open of the requirement."""

    requirement: str
    test: str
    open: str


@dataclass(kw_only=True)
class Requirement:
    """One id with everything that is said about it."""

    what: str = ""
    tests: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)


def known_ids(shared: Path) -> dict[str, str]:
    """Id → title, from the shared folder; empty where it is absent."""
    titles: dict[str, str] = {}
    for name in _SOURCES:
        if (shared / name).is_file():
            text = (shared / name).read_text(encoding="utf-8")
            for pattern in (_ROW, _ITEM):
                titles |= {found[1]: found[2].strip() for found in pattern.finditer(text)}
    return titles


def proofs(folder: Path, *, root: Path) -> list[Proof]:
    """Every mark in the test files below `folder`, in the order of file and line. Raises MarkInvalid."""
    found: list[Proof] = []
    for path in sorted(folder.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "node_modules" in path.parts or "requirement" not in text:
            continue
        name = path.relative_to(root).as_posix()
        found += _in_body(ast.parse(text, filename=str(path)), name, name)
    return found


def collect(found: Sequence[Proof], titles: Mapping[str, str]) -> dict[str, Requirement]:
    """Requirements that a test quotes or this release promises, by area as in the sources, then by number."""
    ids = {p.requirement for p in found} | set(PROMISED)
    order = {name: n for n, name in enumerate(titles)}
    collected = {
        name: Requirement(what=titles.get(name, "")) for name in sorted(ids, key=lambda i: (order.get(i, 0), i))
    }
    for proof in found:
        requirement = collected[proof.requirement]
        if proof.test not in requirement.tests:
            requirement.tests.append(proof.test)
        if proof.open and proof.open not in requirement.open:
            requirement.open.append(proof.open)
    return collected


def unproven(collected: Mapping[str, Requirement]) -> list[str]:
    """Promised ids without a test."""
    return [name for name in PROMISED if not collected[name].tests]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.requirements", description="Requirement → tests.")
    parser.add_argument("--json", action="store_true", help="one JSON object: id → what, tests, open")
    options = parser.parse_args(arguments)
    titles = known_ids(Path(os.environ.get("SEGGATE_SHARED", ROOT.parent / "shared")))
    try:
        found = proofs(ROOT / "tests", root=ROOT)
    except MarkInvalid as error:
        print(error, file=sys.stderr)
        return 1
    collected = collect(found, titles)
    if options.json:
        print(json.dumps({name: vars(r) for name, r in collected.items()}, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(collected, titles)))
    faults = [
        f"{p.test}: {p.requirement} is no known requirement" for p in found if titles and p.requirement not in titles
    ]
    faults += [f"{name} is promised and no test proves it" for name in unproven(collected)]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def _in_body(node: ast.Module | ast.ClassDef, name: str, file: str) -> Iterator[Proof]:
    """Marks of the tests in a module or class; `pytestmark` counts for the whole of it."""
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            marked: list[ast.AST] = [*child.decorator_list]
            yield from _marks(marked, f"{name}::{child.name}", file)
        elif isinstance(child, ast.ClassDef):
            yield from _marks(child.decorator_list, f"{name}::{child.name}", file)
            yield from _in_body(child, f"{name}::{child.name}", file)
        elif isinstance(child, (ast.Assign, ast.AnnAssign)):
            yield from _marks([child], name, file)


def _marks(nodes: Sequence[ast.AST], test: str, file: str) -> Iterator[Proof]:
    for node in nodes:
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.requirement":
                yield from _read(call, test, f"{file}:{call.lineno}")


def _read(call: ast.Call, test: str, where: str) -> Iterator[Proof]:
    ids = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    said = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
    if not ids or len(ids) != len(call.args) or len(said) != len(call.keywords) or not set(said) <= {"open"}:
        raise MarkInvalid(f'{where}: write @pytest.mark.requirement("REC-01", open="what is not covered")')
    for name in ids:
        if not ID.fullmatch(name):
            raise MarkInvalid(f"{where}: {name!r} is not the id of a requirement, such as REC-01")
        yield Proof(requirement=name, test=test, open=str(said.get("open", "")))


def _lines(collected: Mapping[str, Requirement], titles: Mapping[str, str]) -> Iterator[str]:
    for name, requirement in collected.items():
        yield f"{name}  {requirement.what}".rstrip()
        yield from (f"    {test}" for test in requirement.tests)
        yield from (f"    open: {part}" for part in requirement.open)
    quoted = [name for name, requirement in collected.items() if requirement.tests]
    partly = sum(bool(r.open) for r in collected.values())
    yield f"\n{len(quoted)} of {len(titles) or '?'} requirements have tests, {partly} of them with open parts"
    untouched = [name for name in titles if name not in quoted]
    if untouched:
        yield f"without a test: {', '.join(untouched)}"


if __name__ == "__main__":
    sys.exit(main())
