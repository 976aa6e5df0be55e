"""When two patient identities are one, and when they are two."""

from __future__ import annotations

import pytest

from gateway.intake.identity import PatientIdentity, conflicts, merged


def identity(name: str | None = None, **other: str | None) -> PatientIdentity:
    values = {"patient_id": None, "issuer_of_patient_id": None, "patient_birth_date": None} | other
    return PatientIdentity(patient_name=name, **values)


@pytest.mark.requirement("CMP-18")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Doe^Jane", "DOE^JANE"),
        ("Doe^Jane", "Doe^Jane^^^"),
        ("Doe ^ Jane", "Doe^Jane"),
        ("Doe^Jane", None),
        ("Yamada^Tarou=山田^太郎", "Yamada^Tarou"),
        ("Yamada^Tarou=山田^太郎", "=山田^太郎"),
        ("Jérôme", "Je\u0301ro\u0302me"),
    ],
)
def test_same_name_in_other_clothes(first: str, second: str | None) -> None:
    assert conflicts(identity(first), identity(second)) == []


@pytest.mark.requirement("CMP-18")
@pytest.mark.parametrize(
    ("first", "second"),
    [("Doe^Jane", "Doe^John"), ("Doe^Jane", "Doe"), ("Y^T=山田^太郎", "Y^T=山本^太郎"), ("Müller", "Mueller")],
)
def test_two_names(first: str, second: str) -> None:
    assert conflicts(identity(first), identity(second)) == ["PatientName (0010,0010)"]


def test_each_attribute_counts_and_values_are_not_named() -> None:
    one = identity("A", patient_id="1", issuer_of_patient_id="X", patient_birth_date="19700101")
    other = identity("B", patient_id="2", issuer_of_patient_id="Y", patient_birth_date="19700102")
    assert [name.split()[0] for name in conflicts(one, other)] == [
        "PatientID",
        "IssuerOfPatientID",
        "PatientName",
        "PatientBirthDate",
    ]
    assert conflicts(identity(patient_id=" 007"), identity(patient_id="007")) == []
    assert conflicts(identity(patient_id="007"), identity(patient_id="7")) == ["PatientID (0010,0020)"]


def test_merging_keeps_the_first_that_is_not_empty() -> None:
    both = merged(identity("A", patient_id=None), identity("B", patient_id="2"))
    assert (both.patient_name, both.patient_id) == ("A", "2")
