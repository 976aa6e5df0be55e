"""The report, judged by validators that others wrote: fhir.resources, @medplum/core and npm's fhir."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fhir.resources.R4B.bundle import Bundle

from emr.content import Verdict
from emr.document_sink import build_document
from emr.report import build_bundle
from tests.support.peers import program, require_peer
from tests.support.report_content import report_content

NODE = Path(__file__).resolve().parents[1] / "support" / "node"
PATIENT = "Patient/1"
Json = dict[str, Any]


def judged(bundles: list[Json]) -> list[dict[str, list[str]]]:
    """Errors of both npm validators for each bundle."""
    finished = subprocess.run(
        [program("node"), "validate.mjs"],
        input=json.dumps(bundles),
        capture_output=True,
        text=True,
        cwd=NODE,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    answers: list[dict[str, list[str]]] = json.loads(finished.stdout)
    assert len(answers) == len(bundles)
    return answers


def report(organs: int, *, full: bool, **changes: Any) -> Json:
    bundle: Json = json.loads(build_bundle(report_content(organs, full=full, **changes), PATIENT).model_dump_json())
    return bundle


def document(*, full: bool) -> Json:
    resource: Json = json.loads(build_document(report_content(2, full=full), PATIENT).model_dump_json())
    return {"resourceType": "Bundle", "type": "collection", "entry": [{"resource": resource}]}


CASES: dict[str, Callable[[], Json]] = {
    "1 organ, full": lambda: report(1, full=True),
    "1 organ, sparse": lambda: report(1, full=False),
    "2 organs, full": lambda: report(2, full=True),
    "2 organs, sparse": lambda: report(2, full=False),
    "104 organs, full": lambda: report(104, full=True),
    "104 organs, sparse": lambda: report(104, full=False),
    "passed": lambda: report(2, full=True, verdict=Verdict.PASS, checks=()),
    "no archive address": lambda: report(2, full=True, wado_root=None),
    "document": lambda: document(full=True),
    "document, sparse": lambda: document(full=False),
}


@pytest.mark.requirement("EMR-47", "CARD-04")
@pytest.mark.parametrize("case", CASES)
def test_fhir_resources_accepts_every_report(case: str) -> None:
    assert Bundle.model_validate(CASES[case]()).get_resource_type() == "Bundle"


@pytest.mark.requirement("EMR-47", "CARD-04")
@pytest.mark.peer("node")
def test_npm_validators_accept_every_report_as_r4() -> None:
    answers = judged([make() for make in CASES.values()])
    assert dict(zip(CASES, answers, strict=True)) == {case: {"medplum": [], "fhir": []} for case in CASES}


def test_npm_validators_find_faults() -> None:
    """Guards the test above against validators that are called in a way that finds nothing."""
    require_peer("node")
    sound = report(1, full=True)
    spoiled = [copy.deepcopy(sound) for _ in range(3)]
    spoiled[0]["entry"][-1]["resource"]["status"] = "draft"
    del spoiled[1]["entry"][-1]["resource"]["code"]
    spoiled[2]["entry"][-1]["resource"]["unknownField"] = 1
    status, code, unknown = judged(spoiled)
    assert status["fhir"]
    assert code["medplum"]
    assert code["fhir"]
    assert unknown["medplum"]
    assert unknown["fhir"]
