"""gateway.training_data.identities: who is one patient, who may be, and who is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import pytest

from gateway.training_data.case_planning import Draft
from gateway.training_data.identities import Identities
from gateway.training_data.source_scan import SourceSeries

Patient = tuple[str, str]
"""PatientID and its issuer."""


def _draft(number: int, patient: Patient, listed: str | None = None) -> Draft:
    series = SourceSeries(
        study_instance_uid=f"1.{number}",
        series_instance_uid=f"1.{number}.1",
        frames_of_reference=frozenset(),
        modality="CT",
        description="",
        patient_id=patient[0],
        issuer=patient[1],
        patient_name="",
        files=(),
        instances=frozenset(),
    )
    return Draft(series=(series,), labels=(), patient=listed)


def _named(
    tmp_path: Path, patients: Sequence[Patient], listed: Sequence[str | None] = (), *, first: int = 0
) -> tuple[list[str], list[str]]:
    """The pseudonym of each one, and the notes, sorted; what was written before is gone on with."""
    identities = Identities(tmp_path / "who.json")
    names = [*listed, *[None] * (len(patients) - len(listed))]
    drafts = [_draft(first + n, patient, names[n]) for n, patient in enumerate(patients)]
    named = identities.name(drafts, tmp_path)
    identities.write()
    found = {case.draft.series[0].study_instance_uid: case.patient for case in named}
    return [found[f"1.{first + n}"] for n in range(len(patients))], sorted(
        f"{case}: {note}" for case, note in identities.doubts(named)
    )


@pytest.mark.parametrize(
    "patients",
    [
        [("A1", ""), ("A1", "CLINIC")],
        [("A1", "CLINIC"), ("A1 ", ""), (" A1", " CLINIC ")],
        [("A1", ""), (" A1 ", "")],
    ],
)
def test_blanks_and_a_missing_issuer_make_no_second_patient(tmp_path: Path, patients: list[Patient]) -> None:
    for number, order in enumerate(permutations(patients)):
        folder = tmp_path / str(number)
        folder.mkdir()
        found, notes = _named(folder, order)
        assert set(found) == {"patient_0001"}
        assert not notes


def test_an_issuer_that_is_known_later_is_added_to_the_patient(tmp_path: Path) -> None:
    assert _named(tmp_path, [("A1", "")]) == (["patient_0001"], [])
    assert _named(tmp_path, [("A1", "CLINIC"), ("B", "")], first=1)[0] == ["patient_0001", "patient_0002"]
    assert _named(tmp_path, [("A1", "")])[0] == ["patient_0001"]
    patients = json.loads((tmp_path / "who.json").read_text())["patients"]
    assert patients["patient_0001"] == {"patient_id": "A1", "issuer": "CLINIC"}
    # What an earlier version told apart is put together.
    patients["patient_0009"] = {"patient_id": "B", "issuer": "CLINIC"}
    document = json.loads((tmp_path / "who.json").read_text()) | {"patients": patients}
    (tmp_path / "who.json").write_text(json.dumps(document))
    assert _named(tmp_path, [("B", ""), ("B", "CLINIC")])[0] == ["patient_0009", "patient_0009"]


def test_two_issuers_are_two_patients_and_an_id_without_one_is_told(tmp_path: Path) -> None:
    found, notes = _named(tmp_path, [("A1", "CLINIC"), ("A1", "OTHER")])
    assert len(set(found)) == 2
    assert not notes
    found, notes = _named(tmp_path, [("A1", "CLINIC"), ("A1", "OTHER"), ("A1", "")])
    assert len(set(found)) == 3
    assert len(notes) == 3
    (own,) = (note for note in notes if f"its patient, {found[2]}, may be" in note)
    assert found[0] in own
    assert found[1] in own


@pytest.mark.parametrize(
    "patients",
    [[("Secret-a", ""), ("SECRET-A", "")], [("S 1", "X"), ("S1", "X")], [("S1", "Clinic"), ("S1", "CLINIC")]],
)
def test_what_is_only_alike_is_told_by_pseudonym_and_not_joined(tmp_path: Path, patients: list[Patient]) -> None:
    found, notes = _named(tmp_path, [*patients, ("other", "")])
    assert len(set(found)) == 3
    assert len(notes) == 2
    for own, other in (found[:2], found[1::-1]):
        assert sum(f"its patient, {own}, may be {other}: PatientID and issuer" in note for note in notes) == 1
    for note in notes:
        assert "patient column of a --cases file" in note
        assert not any(patient.casefold() in note.casefold() for patient in ("Secret-a", "S 1", "S1"))


def test_a_case_without_a_patient_id_is_told_unless_a_list_says_whose_it_is(tmp_path: Path) -> None:
    found, notes = _named(tmp_path, [("", ""), ("  ", ""), ("", "")], ["p"])
    assert len(set(found)) == 3
    assert len(notes) == 2
    assert all("has no PatientID (0010,0020), and its study counts as its patient" in note for note in notes)


def test_a_list_joins_and_a_patient_who_is_listed_once_only_is_told(tmp_path: Path) -> None:
    found, notes = _named(tmp_path, [("A1", ""), ("A2", ""), ("A1", "")], ["A1", "A1"])
    assert found[0] == found[1] != found[2]
    assert len(notes) == 3
