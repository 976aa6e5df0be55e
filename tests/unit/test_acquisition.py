"""gateway.monitoring.acquisition: what headers say of a scanner, and nothing that names a patient."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from pydicom.dataset import Dataset

from gateway.monitoring.acquisition import AGE, MAX_TEXT, SLICES, Acquisition, read_acquisition


def part(**values: Any) -> Any:
    header = Dataset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the network sends breaks DICOM's rules
        for keyword, value in values.items():
            setattr(header, keyword, value)
    return SimpleNamespace(headers=(header, Dataset()), frames=(1, 2))


def test_scanner_protocol_and_reconstruction_are_read_by_their_streams() -> None:
    found = read_acquisition(
        part(
            Modality="CT",
            Manufacturer="  ACME   Imaging ",
            ManufacturerModelName="One",
            SoftwareVersions=["syngo", "VB20"],
            ConvolutionKernel="B30f",
            KVP="120",
            SliceThickness="1.5",
            ContrastBolusAgent="given to Doe at 9:00",
            PatientAge="042Y",
            PatientName="Doe^Jane",
            ProtocolName="Doe follow-up",
        )
    )
    assert found.categories == {
        "modality": "CT",
        "manufacturer": "ACME Imaging",
        "manufacturer-model": "One",
        "software-versions": "syngo\\VB20",
        "convolution-kernel": "B30f",
        "contrast-agent": "yes",
    }
    assert found.numbers == {SLICES: 2.0, "kvp": 120.0, "slice-thickness-mm": 1.5, AGE: 42.0}
    assert found.scanner == "ACME Imaging One"
    assert "Doe" not in str(found.as_plain())


def test_enhanced_objects_say_it_in_their_shared_functional_groups() -> None:
    echo, group = Dataset(), Dataset()
    echo.EffectiveEchoTime = 4.9
    echo.EchoTime = "4.9"
    group.MREchoSequence = [echo]
    found = read_acquisition(part(Modality="MR", SharedFunctionalGroupsSequence=[group]))
    assert found.numbers["echo-time-ms"] == 4.9


def test_what_is_absent_or_no_number_is_absent() -> None:
    found = read_acquisition(part(Manufacturer="", KVP=None))
    assert found == Acquisition(categories={"contrast-agent": "no"}, numbers={SLICES: 2.0})
    assert found.scanner == ""


def test_long_texts_of_the_network_are_cut() -> None:
    found = read_acquisition(part(Manufacturer="x" * 500, ManufacturerModelName="y" * 500))
    assert len(found.categories["manufacturer"]) == MAX_TEXT
    assert len(found.scanner) == 128


@pytest.mark.parametrize(
    ("age", "years"), [("042Y", 42.0), ("099Y", 90.0), ("018M", 1.0), ("010D", 0.0), ("42", None), ("abcY", None)]
)
def test_ages_are_in_whole_years_and_nobody_is_older_than_ninety(age: str, years: float | None) -> None:
    assert read_acquisition(part(PatientAge=age)).numbers.get(AGE) == years
