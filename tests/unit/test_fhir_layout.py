"""`fhir/` is a source root; the import name `fhir` belongs to fhir.resources."""

from __future__ import annotations

from pathlib import Path

import fhir.resources

import emr

ROOT = Path(__file__).resolve().parents[2]


def test_fhir_folder_is_not_a_package() -> None:
    assert not (ROOT / "fhir" / "__init__.py").exists()


def test_fhir_is_the_third_party_package() -> None:
    assert not Path(str(fhir.resources.__file__)).is_relative_to(ROOT / "fhir")


def test_emr_is_ours() -> None:
    assert emr.__file__ is not None
    assert Path(emr.__file__).is_relative_to(ROOT / "fhir" / "emr")
