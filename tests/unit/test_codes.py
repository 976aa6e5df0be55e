"""The report's codes, compared with pydicom's dictionaries and the values FHIR fixes."""

from __future__ import annotations

import pytest
from pydicom.sr.codedict import codes as dictionary

from emr import codes
from emr.content import Code


@pytest.mark.parametrize(
    ("code", "keyword"),
    [
        (codes.LATERALITY, "Laterality"),
        (codes.LEFT, "Left"),
        (codes.RIGHT, "Right"),
    ],
)
def test_snomed_codes_are_those_of_the_dictionary(code: Code, keyword: str) -> None:
    known = getattr(dictionary.SCT, keyword)
    assert (code.scheme, code.value) == ("SCT", known.value)


def test_volume_is_the_code_that_dicom_reports_use() -> None:
    known = dictionary.SCT.VolumeProperty
    assert (codes.VOLUME.scheme, codes.VOLUME.value) == (known.scheme_designator, known.value)


@pytest.mark.parametrize(
    ("code", "keyword"),
    [
        (codes.SUM_OF_VOXELS, "SumOfSegmentedVoxelMethodForVolume"),
        (codes.QUALITY_ASSESSMENT, "QualityAssessment"),
        (codes.ARTIFICIAL_INTELLIGENCE, "ArtificialIntelligence"),
    ],
)
def test_dicom_codes_are_those_of_the_dictionary(code: Code, keyword: str) -> None:
    known = getattr(dictionary.DCM, keyword)
    assert (code.scheme, code.value, code.meaning) == ("DCM", known.value, known.meaning)


def test_report_code_is_the_one_that_dicom_uses() -> None:
    assert codes.IMAGING_REPORT.value == dictionary.LN.DiagnosticImagingReport.value


def test_known_schemes_become_fhir_systems() -> None:
    assert codes.coding(codes.VOLUME)["system"] == "http://snomed.info/sct"
    assert codes.coding(codes.SUM_OF_VOXELS)["system"] == "http://dicom.nema.org/resources/ontology/DCM"
    assert codes.coding(codes.IMAGING_REPORT)["system"] == "http://loinc.org"


def test_private_scheme_gets_no_invented_system() -> None:
    assert codes.coding(Code(scheme="99LAB", value="x", meaning="X")) == {"code": "x", "display": "X"}
