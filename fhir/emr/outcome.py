"""What a FHIR server says when it refuses, cut down to what may be written into a log (no patient data)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from emr.exchange import Answer

_CODE = re.compile(r"[A-Za-z0-9.-]{1,64}")
_WORD = re.compile(r"[a-z]{1,24}")
# Elements and types of the report: the capitalised words that may stay, as in `DiagnosticReport.subject`.
_TYPES = "Bundle|Device|DiagnosticReport|DocumentReference|ImagingStudy|Observation|OperationOutcome|Patient|Reference"
_PATH = re.compile(rf"({_TYPES})((\.[a-z][A-Za-z]{{0,30}})(\[\d{{1,3}}\])?)*")
_SIZE = re.compile(
    r"too (many|large|big)|(exceed|maximum|limit).{0,40}entries|entries.{0,40}(exceed|maximum|limit)", re.I
)
# R4 issue-type: security and what lies below it, as far as it concerns the sender.
_NOT_ADMITTED = frozenset({"security", "login", "expired", "forbidden"})
_MAX_ISSUES = 5
_MAX_WORDS = 40


def issue_codes(answer: Answer) -> set[str]:
    """Codes of all issues of the OperationOutcome in `answer`; empty if there is none."""
    return {str(issue.get("code")) for issue in _issues(answer)}


def about_content(answer: Answer) -> bool:
    """Whether a FHIR server speaks of what was sent, and not of who sent it: 400 or 422 with an OperationOutcome."""
    said = issue_codes(answer)
    return answer.status in {400, 422} and bool(said) and not said & _NOT_ADMITTED


def refused_for_size(answer: Answer) -> bool:
    """Whether the outcome says that the request was too large: by code, or (servers differ) in words."""
    if answer.status not in {400, 413, 422}:
        return False
    if issue_codes(answer) & {"too-costly", "too-long"}:
        return True
    return any(_SIZE.search(json.dumps(issue)) for issue in _issues(answer))


def summary(answer: Answer, patient_data: Iterable[str] = ()) -> str:
    """Code, expression and diagnostics of each issue. Diagnostics are free text of the server, which may quote the
    patient: only plain lower-case words and element paths stay, and no word of `patient_data`."""
    known = {word for value in patient_data for word in re.findall(r"\w+", value.casefold())}
    lines = [_line(issue, known) for issue in _issues(answer)[:_MAX_ISSUES]]
    return "; ".join(lines) or "no OperationOutcome"


def _line(issue: dict[str, Any], known: set[str]) -> str:
    code = str(issue.get("code"))
    parts = [code if _CODE.fullmatch(code) else "?"]
    details = issue.get("details")
    codings = details.get("coding") if isinstance(details, dict) else None
    for coding in codings if isinstance(codings, list) else []:
        value = str(coding.get("code")) if isinstance(coding, dict) else ""
        if re.fullmatch(r"[A-Za-z][A-Za-z_-]{1,63}", value) and value.casefold() not in known:
            parts.append(value)
    for field in ("expression", "location"):
        values = issue.get(field)
        for value in values[:3] if isinstance(values, list) else []:
            if _PATH.fullmatch(str(value)):
                parts.append(f"at {value}")
    text = issue.get("diagnostics") or (details.get("text") if isinstance(details, dict) else None)
    if isinstance(text, str):
        parts.append(f'"{_harmless(text, known)}"')
    return " ".join(parts)


def _harmless(text: str, known: set[str]) -> str:
    kept: list[str] = []
    for token in text.split()[:_MAX_WORDS]:
        word = token.strip(".,:;()'\"")
        fine = (_WORD.fullmatch(word) and word not in known) or _PATH.fullmatch(word)
        shown = word if fine else "…"
        if shown != "…" or kept[-1:] != ["…"]:
            kept.append(shown)
    return " ".join(kept)


def _issues(answer: Answer) -> list[dict[str, Any]]:
    try:
        body = json.loads(answer.body)
    except (ValueError, RecursionError):
        return []
    issues = body.get("issue") if isinstance(body, dict) and body.get("resourceType") == "OperationOutcome" else None
    return [i for i in issues if isinstance(i, dict)] if isinstance(issues, list) else []
