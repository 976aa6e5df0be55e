"""How a series was acquired, as its headers say: facts that change when a scanner, its software or its protocol does.

Nothing that names a patient or was typed freely is taken (names, dates, descriptions, protocol names). Values that
every slice has are those of the first; enhanced objects are asked in their functional groups too (PS3.3 C.7.6.16).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from pydicom.dataset import Dataset

from gateway.intake.header import PARSER_ERRORS, text_of
from gateway.results.series import SeriesPart

MAX_TEXT = 64
"""Longer texts are cut: what a category is called comes from the network."""

CATEGORIES: Mapping[str, str] = MappingProxyType(
    {
        "modality": "Modality",
        "manufacturer": "Manufacturer",
        "manufacturer-model": "ManufacturerModelName",
        "software-versions": "SoftwareVersions",
        "convolution-kernel": "ConvolutionKernel",
        "body-part": "BodyPartExamined",
        "contrast-agent": "ContrastBolusAgent",
        "patient-position": "PatientPosition",
        "patient-sex": "PatientSex",
        "scanning-sequence": "ScanningSequence",
        "sequence-variant": "SequenceVariant",
        "acquisition-type": "MRAcquisitionType",
        "photometric-interpretation": "PhotometricInterpretation",
    }
)
"""Name of the stream: DICOM keyword. Of `contrast-agent` only whether there is one is kept: its text is free."""

NUMBERS: Mapping[str, str] = MappingProxyType(
    {
        "kvp": "KVP",
        "exposure-mas": "Exposure",
        "slice-thickness-mm": "SliceThickness",
        "repetition-time-ms": "RepetitionTime",
        "echo-time-ms": "EchoTime",
        "flip-angle-deg": "FlipAngle",
        "field-strength-t": "MagneticFieldStrength",
        "bits-stored": "BitsStored",
    }
)
"""Name of the stream: DICOM keyword, in DICOM's unit."""

AGE, SLICES = "patient-age-years", "slices"
_AGE_UNITS = MappingProxyType({"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0})
_OLDEST = 90
"""Years; who is older counts as this old, so that nobody is known by it."""


@dataclass(frozen=True, kw_only=True)
class Acquisition:
    """`categories` and `numbers` by the streams' names; what a header does not say is absent."""

    categories: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def scanner(self) -> str:
        """Manufacturer and model in one text: whose studies belong together. "" where nothing is said."""
        parts = (self.categories.get(key, "") for key in ("manufacturer", "manufacturer-model"))
        return " ".join(part for part in parts if part)[:128]

    def as_plain(self) -> dict[str, Any]:
        return asdict(self)


def read_acquisition(part: SeriesPart) -> Acquisition:
    """Of one volume of a series. Values that cannot be read, or are no numbers where one is due, are absent."""
    places = _places(part.headers[0])
    categories: dict[str, str] = {}
    for name, keyword in CATEGORIES.items():
        found = next((text for place in places if (text := text_of(place, keyword))), None)
        if name == "contrast-agent":
            categories[name] = "yes" if found else "no"
        elif found:
            categories[name] = " ".join(found.split())[:MAX_TEXT]
    numbers = {SLICES: float(len(part.frames))}
    for name, keyword in NUMBERS.items():
        value = next((number for place in places if (number := _number(text_of(place, keyword))) is not None), None)
        if value is not None:
            numbers[name] = value
    years = _years(text_of(part.headers[0], "PatientAge"))
    if years is not None:
        numbers[AGE] = years
    return Acquisition(categories=categories, numbers=numbers)


def _places(header: Dataset) -> list[Dataset]:
    """The data set, and the items of its shared functional groups."""
    places = [header]
    try:
        groups: Iterable[Dataset] = header.get("SharedFunctionalGroupsSequence") or ()
        for group in groups:
            for element in group:
                if element.VR == "SQ":
                    places.extend(element.value)
    except PARSER_ERRORS:
        pass  # what could be read until there is asked
    return places


def _number(text: str | None) -> float | None:
    if not text:
        return None
    try:
        value = float(text.split("\\")[0])
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _years(text: str | None) -> float | None:
    """Of an Age String such as 042Y, in whole years (PS3.5 6.2)."""
    if not text or len(text) != 4 or not text[:3].isdecimal() or text[3] not in _AGE_UNITS:
        return None
    return float(min(_OLDEST, int(int(text[:3]) * _AGE_UNITS[text[3]])))
