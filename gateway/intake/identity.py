"""Whether two objects speak of the same patient (CMP-18).

Absent or empty never conflicts; two different non-empty values do.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PatientIdentity:
    """The attributes that say who the patient is, decoded; None when absent or empty."""

    patient_id: str | None
    issuer_of_patient_id: str | None
    patient_name: str | None
    patient_birth_date: str | None


def conflicts(first: PatientIdentity, second: PatientIdentity) -> list[str]:
    """Attributes in which the two differ, as "Keyword (gggg,eeee)"; values are never named."""
    return [
        name for field, name, differs in _COMPARISONS if _differ(getattr(first, field), getattr(second, field), differs)
    ]


def merged(first: PatientIdentity, second: PatientIdentity) -> PatientIdentity:
    """The first non-empty values."""
    return PatientIdentity(**{field: getattr(first, field) or getattr(second, field) for field, _, _ in _COMPARISONS})


def _differ(first: str | None, second: str | None, differs: Callable[[str, str], bool]) -> bool:
    return bool(first) and bool(second) and differs(str(first), str(second))


def _texts_differ(first: str, second: str) -> bool:
    return _plain(first) != _plain(second)


def _names_differ(first: str, second: str) -> bool:
    """Component groups (alphabetic, ideographic, phonetic; PS3.5 6.2.1) are compared where both names have them."""
    pairs = zip(first.split("="), second.split("="), strict=False)
    groups = [(_components(one), _components(other)) for one, other in pairs]
    return any(one and other and one != other for one, other in groups)


def _components(group: str) -> list[str]:
    """Name components without trailing empty ones; case, and how many spaces there are, do not matter."""
    components = [" ".join(_plain(component).split()).casefold() for component in group.split("^")]
    while components and not components[-1]:
        components.pop()
    return components


def _plain(value: str) -> str:
    return unicodedata.normalize("NFC", value).strip()


_COMPARISONS: tuple[tuple[str, str, Callable[[str, str], bool]], ...] = (
    ("patient_id", "PatientID (0010,0020)", _texts_differ),
    ("issuer_of_patient_id", "IssuerOfPatientID (0010,0021)", _texts_differ),
    ("patient_name", "PatientName (0010,0010)", _names_differ),
    ("patient_birth_date", "PatientBirthDate (0010,0030)", _texts_differ),
)
