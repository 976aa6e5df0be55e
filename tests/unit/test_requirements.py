"""The list of requirements: read from the tests' source, checked against the ids that exist."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests import requirements
from tests.requirements import MarkInvalid, Proof, collect, known_ids, proofs, unproven


def _proofs(folder: Path, source: str) -> list[Proof]:
    (folder / "test_it.py").write_text(textwrap.dedent(source))
    return proofs(folder, root=folder)


def test_marks_on_functions_classes_modules_and_parameters_are_found(tmp_path: Path) -> None:
    found = _proofs(
        tmp_path,
        """
        import pytest
        pytestmark = pytest.mark.requirement("OPS-57")

        @pytest.mark.requirement("REC-01", "REC-02", open="power cut")
        def test_one(): ...

        @pytest.mark.requirement("CMP-15")
        class TestTwo:
            @pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.requirement("RTE-21"))])
            async def test_three(self, x): ...
        """,
    )
    assert [(p.requirement, p.test, p.open) for p in found] == [
        ("OPS-57", "test_it.py", ""),
        ("REC-01", "test_it.py::test_one", "power cut"),
        ("REC-02", "test_it.py::test_one", "power cut"),
        ("CMP-15", "test_it.py::TestTwo", ""),
        ("RTE-21", "test_it.py::TestTwo::test_three", ""),
    ]


@pytest.mark.parametrize("mark", ['"REC-1"', '"FOO-01"', "NAME", "", '"REC-01", closed="x"', '"REC-01", open=WHAT'])
def test_a_mark_that_cannot_be_read_is_an_error_with_its_place(tmp_path: Path, mark: str) -> None:
    with pytest.raises(MarkInvalid, match=r"test_it\.py:2"):
        _proofs(tmp_path, f"import pytest\n@pytest.mark.requirement({mark})\ndef test_one(): ...\n")


def test_ids_and_titles_are_read_from_both_sources(tmp_path: Path) -> None:
    (tmp_path / "facts").mkdir()
    (tmp_path / "mission.md").write_text("| id | what |\n| --- | --- |\n| ART-01 | a format | as written |\n")
    (tmp_path / "facts" / "acceptance-items.md").write_text("- **REC-01 Ack means durable.** Given REC-99 …\n")
    assert known_ids(tmp_path) == {"ART-01": "a format", "REC-01": "Ack means durable."}
    assert known_ids(tmp_path / "absent") == {}


def test_a_promised_id_without_a_test_is_listed() -> None:
    some = [Proof(requirement=i, test=f"t::{i}", open="") for i in requirements.PROMISED if i != "REC-01"]
    assert unproven(collect(some, {})) == ["REC-01"]


def test_open_parts_and_tests_are_listed_once_per_id() -> None:
    twice = [Proof(requirement="REC-01", test="t::a", open="power cut")] * 2
    collected = collect([*twice, Proof(requirement="REC-01", test="t::b", open="")], {"REC-01": "Ack"})["REC-01"]
    assert (collected.what, collected.tests, collected.open) == ("Ack", ["t::a", "t::b"], ["power cut"])


@pytest.mark.peer("shared-data")
def test_every_promised_id_exists(shared_root: Path) -> None:
    assert set(requirements.PROMISED) <= set(known_ids(shared_root))


@pytest.mark.peer("shared-data")
def test_every_id_that_a_test_quotes_exists(shared_root: Path) -> None:
    quoted = {p.requirement: p.test for p in proofs(requirements.ROOT / "tests", root=requirements.ROOT)}
    known = known_ids(shared_root)
    assert {i: t for i, t in quoted.items() if i not in known} == {}


def test_every_promised_id_has_a_test() -> None:
    found = proofs(requirements.ROOT / "tests", root=requirements.ROOT)
    assert unproven(collect(found, {})) == []


def test_every_listed_test_exists() -> None:
    for proof in proofs(requirements.ROOT / "tests", root=requirements.ROOT):
        file, _, name = proof.test.partition("::")
        last = name.rpartition("::")[2]
        if last:
            tree = ast.parse((requirements.ROOT / file).read_text(encoding="utf-8"))
            names = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
            assert last in names
            assert last.startswith(("test_", "Test")), f"{proof.test} is marked and is no test"


def test_the_command_prints_one_json_object_and_is_fast() -> None:
    begin = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-m", "tests.requirements", "--json"],
        cwd=requirements.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    seconds = time.perf_counter() - begin
    said = json.loads(ran.stdout)
    assert said["REC-04"]["tests"]
    assert set(requirements.PROMISED) <= set(said)
    assert seconds < 30
