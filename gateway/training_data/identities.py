"""Pseudonyms of cases and patients, and the private file that alone says who they are.

    DatasetNNN_Name.identities.json     beside the dataset, readable by its owner alone
      {"cases": {"case_0001": {"patient": "patient_0001", "study": "...", "series": ["..."], "labels": ["..."]}},
       "patients": {"patient_0001": {"patient_id": "...", "issuer": "..."}}}

A case that was there keeps its name. New ones are numbered by a digest of their UIDs, so that a number tells nothing
about when or of whom it was made.

A patient is a PatientID with its issuer (PS3.3 C.7.1.1), blanks at the ends aside. Systems leave the issuer out: an ID
without one is that of the only issuer that is known for it. What is merely alike is told and not joined.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.json_reader import Reader, read_json
from engine.json_writer import write_json
from gateway.errors import Rejected
from gateway.training_data.case_planning import Draft
from gateway.training_data.source_scan import shown

ABOUT = "Says which patients the cases are. Keep it apart from the dataset, and do not pass it on with it."
_CASE, _PATIENT = "case", "patient"
_LIST = "list of cases"
"""The issuer of names of patients that a list gives."""
_MOST = 10**6


@dataclass(frozen=True, kw_only=True)
class NamedCase:
    """A draft with the pseudonyms of case and patient."""

    name: str
    patient: str
    draft: Draft


class Identities:
    """What the private file says, with the cases of this source added by `name`."""

    def __init__(self, path: Path) -> None:
        """Raises Rejected when a file is there that cannot be read."""
        self._path = path
        self._cases: dict[str, dict[str, Any]] = {}
        self._patients: dict[str, dict[str, str]] = {}
        if path.exists():
            content = Reader(read_json(path, error=Rejected), where=path.name, error=Rejected)
            patients, cases = content.child("patients"), content.child("cases")
            for name in patients.keys():  # noqa: SIM118 - Reader is no mapping; keys() checks each key
                entry = patients.child(name)
                self._patients[name] = {key: entry.text(key, "", empty=True) for key in ("patient_id", "issuer")}
            for name in cases.keys():  # noqa: SIM118
                entry = cases.child(name)
                self._cases[name] = {
                    "patient": entry.text("patient"),
                    "study": entry.text("study"),
                    "series": list(entry.texts("series", lengths=(1, 256))),
                    "labels": list(entry.texts("labels", lengths=(0, _MOST))),
                }

    def name(self, drafts: Iterable[Draft], root: Path) -> tuple[NamedCase, ...]:
        """Pseudonyms for all drafts, sorted by name. Raises Rejected when a list's name is another case's."""
        drafts = tuple(drafts)
        issuers = self._issuers(drafts)
        known = {"|".join(case["series"]): name for name, case in self._cases.items()}
        ordered = sorted(drafts, key=lambda draft: hashlib.sha256(draft.key.encode()).hexdigest())
        named = []
        for draft in sorted(ordered, key=lambda d: d.listed is None):
            name = draft.listed or known.get(draft.key) or _next(_CASE, self._cases)
            if name in self._cases and known.get(draft.key) != name:
                raise Rejected(f"case {name!r}: is already the name of other series in {self._path.name}")
            earlier = known.get(draft.key)
            if earlier is not None and earlier != name:
                raise Rejected(f"case {name!r}: its series are already {earlier!r} in {self._path.name}")
            patient = self._patient(draft, issuers)
            self._cases[name] = {
                "patient": patient,
                "study": draft.series[0].study_instance_uid,
                "series": [series.series_instance_uid for series in draft.series],
                "labels": [label.sop_instance_uid or shown(label.file, root) for label in draft.labels],
            }
            known[draft.key] = name
            named.append(NamedCase(name=name, patient=patient, draft=draft))
        return tuple(sorted(named, key=lambda case: case.name))

    def gone(self, named: Sequence[NamedCase]) -> list[str]:
        """Cases of the file that the source does not make any more."""
        return sorted(set(self._cases) - {case.name for case in named})

    def write(self) -> None:
        """Whole or not at all. Raises OSError."""
        before = os.umask(0o077)
        try:
            write_json({"about": ABOUT, "cases": self._cases, "patients": self._patients}, self._path)
        finally:
            os.umask(before)

    def doubts(self, named: Sequence[NamedCase]) -> list[tuple[str, str]]:
        """Cases, each with why splits might part it from others of the same person."""
        remedy = (
            "if so, give them one name in the patient column of a --cases file: splits keep a patient's cases together"
        )
        alike: dict[str, list[str]] = {}
        for name in sorted({case.patient for case in named}):
            alike.setdefault(_folded(self._patients[name]["patient_id"]), []).append(name)
        notes = []
        for case in named:
            own = self._patients[case.patient]
            if not own["patient_id"]:
                text = "has no PatientID (0010,0020), and its study counts as its patient, who may be another case's"
                notes.append((case.name, f"{text}; {remedy}"))
                continue
            others = [
                other
                for other in alike[_folded(own["patient_id"])]
                if other != case.patient and _may_be_one(own["issuer"], self._patients[other]["issuer"])
            ]
            if others:
                text = (
                    f"its patient, {case.patient}, may be {' or '.join(others)}: PatientID and issuer are the same but "
                    "for capitals, blanks, or an issuer that is not given"
                )
                notes.append((case.name, f"{text}; {remedy}"))
        return notes

    def _issuers(self, drafts: Iterable[Draft]) -> Mapping[str, frozenset[str]]:
        """The issuers that are known for each PatientID."""
        found: dict[str, set[str]] = {}
        for draft in drafts:
            for series in draft.series:
                found.setdefault(series.patient_id.strip(), set()).add(series.issuer.strip())
        for patient in self._patients.values():
            if patient["issuer"] != _LIST:
                found.setdefault(patient["patient_id"], set()).add(patient["issuer"])
        return {patient_id: frozenset(issuers - {""}) for patient_id, issuers in found.items()}

    def _patient(self, draft: Draft, issuers: Mapping[str, frozenset[str]]) -> str:
        """Of the list's name, else of PatientID with its issuer, else (without one) of the study."""
        first = draft.series[0]
        patient_id, issuer = first.patient_id.strip(), first.issuer.strip()
        if draft.patient is not None:
            identity = {"patient_id": draft.patient.strip(), "issuer": _LIST}
        elif patient_id:
            only = len(issuers[patient_id]) == 1
            identity = {"patient_id": patient_id, "issuer": next(iter(issuers[patient_id])) if only else issuer}
            if only and identity not in self._patients.values():
                # Who was written down without an issuer has one now.
                for known in self._patients.values():
                    if known == {"patient_id": patient_id, "issuer": ""}:
                        known["issuer"] = identity["issuer"]
        else:
            identity = {"patient_id": "", "issuer": first.study_instance_uid}
        for name, known in self._patients.items():
            if known == identity:
                return name
        name = _next(_PATIENT, self._patients)
        self._patients[name] = identity
        return name


def _folded(text: str) -> str:
    return "".join(text.split()).casefold()


def _may_be_one(issuer: str, other: str) -> bool:
    return _folded(issuer) == _folded(other) or not {issuer, other}.isdisjoint(("", _LIST))


def _next(prefix: str, taken: Mapping[str, object]) -> str:
    """The first number that is free after all that were given."""
    numbers = [int(n) for key in taken if (n := key.removeprefix(f"{prefix}_")).isdecimal() and n != key]
    return f"{prefix}_{max(numbers, default=0) + 1:04d}"
