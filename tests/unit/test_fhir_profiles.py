"""`fhir/profiles/`: the example and the code system are what the program makes today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fhir.resources.R4B.codesystem import CodeSystem

from emr import codes
from emr.report import build_bundle
from tests.support.report_content import report_content

PROFILES = Path(__file__).resolve().parents[2] / "fhir" / "profiles"


def read(name: str) -> Any:
    return json.loads((PROFILES / name).read_text(encoding="utf-8"))


def test_report_is_the_published_example() -> None:
    """A change here changes what EMRs get: identifiers must stay, or old and new reports are not known as the same."""
    made = json.loads(build_bundle(report_content(2), "Patient/1").model_dump_json())
    assert made == read("example-report.json")


def test_code_system_lists_our_codes() -> None:
    resource = read("codesystem-seggate.json")
    assert CodeSystem.model_validate(resource).url == codes.CODE_SYSTEM
    assert {c["code"]: c["display"] for c in resource["concept"]} == codes.OWN_CODES
