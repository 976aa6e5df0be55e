"""build_bundle: what the transaction says, that it is always the same, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from datetime import datetime
from typing import Any

import pytest

from emr import codes
from emr.capability import Capability
from emr.content import Code, ReportCheck, ReportModel, ReportObject, ReportSegment, ReportSeries, Verdict
from emr.document_sink import build_document, render_html
from emr.errors import ReportInvalid
from emr.report import binding_faults, build_bundle, person_display, validated
from tests.support.report_content import LIVER, SERIES_UID, report_content, report_segment

PATIENT = "Patient/42"


def bundle_of(*arguments: Any, **options: Any) -> dict[str, Any]:
    built: dict[str, Any] = json.loads(build_bundle(report_content(*arguments, **options), PATIENT).model_dump_json())
    return built


def resources(bundle: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [e["resource"] for e in bundle["entry"] if e["resource"]["resourceType"] == kind]


@pytest.mark.requirement("CARD-04", "EMR-47")
@pytest.mark.parametrize("organs", [1, 2, 104])
def test_report_is_preliminary_and_refers_to_every_observation(organs: int) -> None:
    bundle = bundle_of(organs)
    report = resources(bundle, "DiagnosticReport")[0]
    urls = {e["fullUrl"] for e in bundle["entry"] if e["resource"]["resourceType"] == "Observation"}
    assert report["status"] == "preliminary"
    assert {r["reference"] for r in report["result"]} == urls
    assert len(urls) == organs + 1
    assert report["conclusion"].startswith("AI result, not reviewed.")
    assert report["code"]["coding"][0]["code"] == "18748-4"


@pytest.mark.requirement("ART-25", open="saliency")
def test_payload_names_patient_study_objects_volumes_confidence_dice_and_quality() -> None:
    bundle = bundle_of(1)
    report = resources(bundle, "DiagnosticReport")[0]
    volume, quality = resources(bundle, "Observation")
    assert report["subject"]["reference"] == PATIENT
    study = {"system": "urn:dicom:uid", "value": "urn:oid:1.2.826.0.1.3680043.8.498.1"}
    assert report["imagingStudy"][0]["identifier"] == study
    assert report["basedOn"][0]["identifier"]["value"] == "ACC-778812"
    documents = {d["masterIdentifier"]["value"] for d in resources(bundle, "DocumentReference")}
    assert documents == {"urn:oid:2.25.11", "urn:oid:2.25.21"}
    assert volume["valueQuantity"]["value"] == pytest.approx(1.2346)
    assert volume["valueQuantity"]["code"] == "mL"
    assert volume["bodySite"]["coding"][0]["code"] == LIVER.value
    components = {c["code"]["coding"][0]["code"]: c for c in volume["component"]}
    assert components["mean-confidence"]["valueQuantity"]["value"] == pytest.approx(0.9)
    assert components["dice-coefficient"]["valueQuantity"]["value"] == pytest.approx(0.87)
    assert components["voxel-count"]["valueQuantity"]["value"] == 1000
    assert components["272741003"]["valueCodeableConcept"]["coding"][0]["code"] == "7771000"
    assert quality["valueCodeableConcept"]["coding"][0]["code"] == "verdict-review"
    flags = {
        c["code"]["coding"][0]["code"]: c["interpretation"][0]["coding"][0]["code"] for c in quality["component"][:3]
    }
    assert flags == {"check-empty": "N", "check-touches-border": "A", "check-fold-dice": "N"}


@pytest.mark.requirement("EMR-47")
def test_same_content_makes_the_same_bytes_with_conditional_creates() -> None:
    first = build_bundle(report_content(3), PATIENT).model_dump_json()
    assert first == build_bundle(report_content(3), PATIENT).model_dump_json()
    entries = json.loads(first)["entry"]
    assert len({e["fullUrl"] for e in entries}) == len(entries)
    assert len({(e["request"]["url"], e["request"]["ifNoneExist"]) for e in entries}) == len(entries)
    for entry in entries:
        assert re.fullmatch(r"identifier=urn:oid:2\.25\.\d+%7C[A-Za-z0-9.-]+", entry["request"]["ifNoneExist"])


def test_device_is_shared_by_reports_of_the_same_model_and_no_other() -> None:
    def device(**changes: Any) -> str:
        url: str = bundle_of(1, **changes)["entry"][0]["request"]["ifNoneExist"]
        return url

    other = ReportModel(name="hippocampus-mr", version="1.0.0", weights_digest="cd" * 32)
    assert device() == device(result_id="f" * 32)
    assert device() != device(model=other)
    assert device() != device(software_version="0.2.0")


def test_patient_and_study_are_never_created() -> None:
    kinds = {e["resource"]["resourceType"] for e in bundle_of(2)["entry"]}
    assert kinds == {"Device", "Observation", "DocumentReference", "DiagnosticReport"}


def test_documents_point_to_the_archive_or_to_the_uid() -> None:
    url = resources(bundle_of(1), "DocumentReference")[0]["content"][0]["attachment"]["url"]
    assert url == (
        "https://pacs.example/dicom-web/studies/1.2.826.0.1.3680043.8.498.1/series/2.25.12/instances/2.25.11"
    )
    url = resources(bundle_of(1, wado_root=None), "DocumentReference")[0]["content"][0]["attachment"]["url"]
    assert url == "urn:oid:2.25.11"


@pytest.mark.requirement("CMP-20", "EMR-47")
def test_two_series_of_a_study_make_reports_that_a_reader_can_tell_apart() -> None:
    other = ReportSeries(series_instance_uid="1.2.3", number=4, description="T1 axial")
    first, second = bundle_of(1), bundle_of(1, series=other)
    named = "series 3 (T1 koronar, Hippocampus), part EchoTime=4.9"
    for bundle, words, uid in ((first, named, SERIES_UID), (second, "series 4 (T1 axial)", "1.2.3")):
        assert f"hippocampus-mr 1.0.0 in {words}." in resources(bundle, "DiagnosticReport")[0]["conclusion"]
        for observation in resources(bundle, "Observation"):
            (source,) = observation["derivedFrom"]
            assert source["identifier"] == observation["partOf"][0]["identifier"]
            assert source["display"] == f"{words}; Series Instance UID {uid}"
        for document in resources(bundle, "DocumentReference"):
            assert document["description"].endswith(f", not reviewed; {words}")
            assert document["context"]["related"][1] == {
                "identifier": {"system": "urn:dicom:uid", "value": f"urn:oid:{uid}"},
                "display": words,
            }


@pytest.mark.parametrize(
    ("series", "shown"),
    [
        ({"number": 0}, "series 0"),
        ({"description": " T1\t ax\x1b\u200bial "}, "series (T1 axial)"),
        ({"description": "x" * 99}, f"series ({'x' * 64})"),
        ({}, "series 1.2.3"),
    ],
)
def test_a_series_is_named_by_what_the_images_say_of_it(series: dict[str, Any], shown: str) -> None:
    assert ReportSeries(series_instance_uid="1.2.3", **series).shown == shown


@pytest.mark.requirement("OUT-44")
def test_a_picture_that_stands_in_for_a_segmentation_is_the_document_of_the_image() -> None:
    picture = ReportObject(role="SC", sop_class_uid="1.2", sop_instance_uid="2.25.31", series_instance_uid="2.25.32")
    (document,) = resources(bundle_of(1, objects=(picture,)), "DocumentReference")
    assert document["masterIdentifier"]["value"] == "urn:oid:2.25.31"
    assert document["description"].startswith("AI segmentation as pictures (DICOM SC), not reviewed")
    assert document["identifier"][0]["value"].endswith(".seg")  # so that a retry, or a later version, finds it
    assert document["relatesTo"][0]["target"]["identifier"]["value"] == "b" * 32 + ".seg"


def test_new_version_replaces_the_documents_of_the_old() -> None:
    seg, sr = resources(bundle_of(1), "DocumentReference")
    assert seg["relatesTo"][0]["code"] == "replaces"
    assert seg["relatesTo"][0]["target"]["identifier"]["value"] == "b" * 32 + ".seg"
    assert sr["relatesTo"][0]["target"]["identifier"]["value"] == "b" * 32 + ".sr"
    assert "relatesTo" not in resources(bundle_of(1, supersedes_result_id=None), "DocumentReference")[0]


def test_study_without_a_date_states_the_absence() -> None:
    report = resources(bundle_of(1, full=False), "DiagnosticReport")[0]
    assert "effectiveDateTime" not in report
    assert report["_effectiveDateTime"]["extension"][0]["valueCode"] == "unknown"


def test_side_is_in_the_text_even_where_the_name_does_not_say_it() -> None:
    segments = (
        ReportSegment(number=1, name="Left kidney", code=LIVER, laterality="left", volume_ml=1, voxels=1),
        ReportSegment(number=2, name="Liver", code=LIVER, laterality="right", volume_ml=1, voxels=1),
    )
    left, right, _ = resources(bundle_of(segments=segments), "Observation")
    assert left["bodySite"]["text"] == "Left kidney (Liver)"
    assert right["bodySite"]["text"] == "Liver, right"


def test_absent_server_types_are_left_out_and_the_device_named_by_identifier() -> None:
    able = Capability(interactions={t: frozenset({"create"}) for t in ("Observation", "DiagnosticReport")})
    bundle = json.loads(build_bundle(report_content(1), PATIENT, able).model_dump_json())
    assert {e["resource"]["resourceType"] for e in bundle["entry"]} == {"Observation", "DiagnosticReport"}
    assert resources(bundle, "Observation")[0]["device"]["identifier"]["system"] == codes.IDENTIFIER_SYSTEM


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Yamada^Tarou=山田^太郎=やまだ^たろう", "Yamada, Tarou (山田, 太郎) (やまだ, たろう)"),
        ("Adams^John Robert Quincy^^Rev.^B.A. M.Div.", "Rev. Adams, John Robert Quincy B.A. M.Div."),
        ("=김희중", "김희중"),
        ("Müller", "Müller"),
        ("^^^^", ""),
        ("", ""),
    ],
)
def test_names_are_shown_as_people_write_them(name: str, shown: str) -> None:
    assert person_display(name) == shown


@pytest.mark.parametrize("reference", ["Patient?identifier=x", "urn:uuid:1", "Patient/", "Patient/a/b", "Group/1"])
def test_patient_reference_must_be_literal(reference: str) -> None:
    with pytest.raises(ReportInvalid, match="literal"):
        build_bundle(report_content(1), reference)


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("type",), "transactions", "Bundle.type"),
        (("entry", 0, "request", "method"), "CREATE", "Bundle.entry.request.method"),
        (("entry", 0, "resource", "status"), "on", "Device.status"),
        (("entry", 0, "resource", "deviceName", 0, "type"), "nickname", "Device.deviceName.type"),
        (("entry", 1, "resource", "status"), "prelim", "Observation.status"),
        (("entry", 3, "resource", "status"), "final", "DocumentReference.status"),
        (("entry", 3, "resource", "docStatus"), "current", "DocumentReference.docStatus"),
        (("entry", 3, "resource", "relatesTo", 0, "code"), "supersedes", "DocumentReference.relatesTo.code"),
        (("entry", 5, "resource", "status"), "draft", "DiagnosticReport.status"),
        (("entry", 5, "resource", "subject", "type"), "Practitioner", "DiagnosticReport.subject"),
        (("entry", 5, "resource", "imagingStudy", 0, "type"), "Media", "DiagnosticReport.imagingStudy"),
        (("entry", 5, "resource", "result", 0, "reference"), "Device/1", "DiagnosticReport.result"),
        (("entry", 1, "resource", "device", "reference"), "Patient/1", "Observation.device"),
    ],
)
def test_code_or_reference_outside_the_standard_is_refused(path: tuple[Any, ...], value: str, fault: str) -> None:
    bundle = bundle_of(1)
    assert list(binding_faults(bundle)) == []
    node: Any = bundle
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ReportInvalid, match=re.escape(fault)):
        validated(bundle)


def test_unknown_field_is_refused_without_its_value() -> None:
    bundle = bundle_of(1)
    bundle["entry"][5]["resource"]["patientName"] = "Yamada"
    with pytest.raises(ReportInvalid, match="not valid FHIR") as caught:
        validated(bundle)
    assert "Yamada" not in str(caught.value)


@pytest.mark.requirement("CARD-04")
@pytest.mark.parametrize(
    "changes",
    [
        {"verdict": Verdict.HOLD},
        {"checks": (ReportCheck(name="empty", value=0, limit=1, verdict=Verdict.HOLD),)},
        {"segments": ()},
        {"segments": (report_segment(1), report_segment(1))},
        {"result_id": "a|b"},
        {"supersedes_result_id": "a b"},
        {"study_instance_uid": "1.02.3"},
        {"study_instance_uid": "1." + "2" * 64},
        {"issued": datetime(2026, 1, 1)},
        {"mean_confidence": 1.5},
        {"wado_root": "https://user:secret@pacs.example/"},
        {"wado_root": "javascript:alert(1)"},
    ],
)
def test_content_that_must_not_leave_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ReportInvalid):
        report_content(1, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"volume_ml": math.nan},
        {"volume_ml": -1.0},
        {"voxels": -1},
        {"number": 0},
        {"name": " "},
        {"confidence": 1.01},
        {"dice": math.nan},
        {"mean_intensity": math.inf},
    ],
)
def test_impossible_measurements_are_refused(changes: dict[str, Any]) -> None:
    values: dict[str, Any] = {"number": 1, "name": "Liver", "code": LIVER, "volume_ml": 1.0, "voxels": 1}
    with pytest.raises(ReportInvalid, match="segment"):
        ReportSegment(**(values | changes))


def test_other_values_are_checked_too() -> None:
    with pytest.raises(ReportInvalid):
        Code(scheme="SCT", value="", meaning="Liver")
    with pytest.raises(ReportInvalid):
        ReportModel(name="m", version="1", weights_digest="no digest")
    with pytest.raises(ReportInvalid):
        ReportCheck(name="a b|c", value=1, limit=1, verdict=Verdict.PASS)
    with pytest.raises(ReportInvalid):
        ReportObject(role="SEG", sop_class_uid="1.2", sop_instance_uid="../x", series_instance_uid="1.2")


def test_repr_of_the_content_does_not_identify_the_patient() -> None:
    shown = repr(report_content(1))
    for value in ("P|0,4", "Yamada", "ACC-778812", "koronar", "EchoTime"):
        assert value not in shown


def test_document_holds_the_report_as_escaped_html() -> None:
    segment = ReportSegment(number=1, name="<script>x</script>", code=LIVER, volume_ml=2.5, voxels=7)
    content = report_content(segments=(segment,))
    page = render_html(content)
    assert "<script>" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert "2.50" in page
    assert "AI result, not reviewed." in page
    assert "series 3 (T1 koronar, Hippocampus), part EchoTime=4.9" in page
    assert SERIES_UID in page
    document = json.loads(build_document(content, PATIENT).model_dump_json())
    assert document["docStatus"] == "preliminary"
    assert document["subject"]["reference"] == PATIENT
    assert list(binding_faults(document)) == []
