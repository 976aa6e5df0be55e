"""Takes from a source header what a result must carry, and repairs or drops by rule what is illegal (OUT-39).

Only attributes of RULES are carried over; each has a rule for what to do when it is missing or illegal, and every
deviation is recorded as a Repair that names the attribute and never its value. Text is decoded by the source's
Specific Character Set and written as UTF-8. Values that say who the patient is, or which order this was, are never
altered, even where they are too long: a changed identifier would attach the result to another patient.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from pydicom import config
from pydicom.charset import decode_bytes
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as DicomSequence
from pydicom.valuerep import PersonName

from gateway.errors import Rejected
from gateway.intake.header import text_of
from gateway.results.attributes import PARSER_ERRORS
from gateway.results.content import Repair

_IDENTITY = (
    "PatientID",
    "IssuerOfPatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
)
# pydicom reports a sequence that ends too early as OSError.
_UNREADABLE: tuple[type[Exception], ...] = (*PARSER_ERRORS, OSError)
_MAX_LENGTH = {"SH": 16, "LO": 64, "CS": 16, "UI": 64, "ST": 1024, "DS": 16, "IS": 12, "AS": 4}
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # TAB is cleaned below; ESC never survives decoding
_UID = re.compile(r"[0-9]+(?:\.[0-9]+)+")
_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_TIME = re.compile(r"(?:[01]\d|2[0-3])(?:[0-5]\d(?:(?:[0-5]\d|60)(?:\.\d{1,6})?)?)?")
_COLON_TIME = re.compile(r"(\d\d):(\d\d):(\d\d(?:\.\d{1,6})?)")
_OFFSET = re.compile(r"[+-]\d\d[0-5]\d", re.ASCII)
_DOT_DATE = re.compile(r"(\d{4})\.(\d\d)\.(\d\d)")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a result's header wants of one attribute (the types of PS3.3 for the modules we write).

    presence: "required" = without it there is no result; "empty" = written empty when missing or illegal (type 2);
    "optional" = left out. identity: never altered. code_sequence: items must have value, scheme and meaning.
    """

    keyword: str
    presence: str = "optional"
    identity: bool = False
    enumerated: tuple[str, ...] = ()
    code_sequence: bool = False


RULES: tuple[Rule, ...] = (
    # Patient
    Rule(keyword="PatientName", presence="empty", identity=True),
    Rule(keyword="PatientID", presence="empty", identity=True),
    Rule(keyword="IssuerOfPatientID", identity=True),
    Rule(keyword="PatientBirthDate", presence="empty"),
    Rule(keyword="PatientSex", presence="empty", enumerated=("M", "F", "O")),
    Rule(keyword="PatientIdentityRemoved", enumerated=("YES", "NO")),
    Rule(keyword="DeidentificationMethod"),
    Rule(keyword="DeidentificationMethodCodeSequence", code_sequence=True),
    # Study
    Rule(keyword="StudyInstanceUID", presence="required", identity=True),
    Rule(keyword="StudyDate", presence="empty"),
    Rule(keyword="StudyTime", presence="empty"),
    Rule(keyword="ReferringPhysicianName", presence="empty"),
    Rule(keyword="StudyID", presence="empty"),
    Rule(keyword="AccessionNumber", presence="empty", identity=True),
    Rule(keyword="StudyDescription"),
    Rule(keyword="ProcedureCodeSequence", code_sequence=True),
    Rule(keyword="PatientAge"),
    Rule(keyword="PatientSize"),
    Rule(keyword="PatientWeight"),
    # SOP common: holds for the dates and times above and for ours (PS3.3 C.12.1.1.8)
    Rule(keyword="TimezoneOffsetFromUTC"),
)
"""Copied into every result."""

SOURCE_RULES: tuple[Rule, ...] = (
    Rule(keyword="SeriesInstanceUID", presence="required", identity=True),
    Rule(keyword="SOPInstanceUID", presence="required", identity=True),
    Rule(keyword="SOPClassUID", presence="required", identity=True),
    Rule(keyword="SeriesNumber"),
    Rule(keyword="SeriesDescription"),
    Rule(keyword="BodyPartExamined"),
    Rule(keyword="Laterality", enumerated=("L", "R")),
    Rule(keyword="FrameOfReferenceUID"),
    Rule(keyword="PositionReferenceIndicator"),
    Rule(keyword="Manufacturer"),
    Rule(keyword="ManufacturerModelName"),
    Rule(keyword="SoftwareVersions"),
    Rule(keyword="StationName"),
    Rule(keyword="InstitutionName"),
    Rule(keyword="SliceThickness"),
)
"""Read besides; the encoders decide where they go."""


def identified(headers: Sequence[Dataset]) -> Dataset:
    """The first slice's header, its empty identity attributes filled in from the first slice that has a value.

    Intake lets slices without a value pass (absent never conflicts); the result must not be filed under nobody.
    """
    header = headers[0]
    for keyword in _IDENTITY:
        if text_of(header, keyword) is None:
            value = next((v for h in headers if (v := text_of(h, keyword)) is not None), None)
            if value is not None:
                setattr(header, keyword, value)
    return header


def repaired_header(source: Dataset) -> tuple[Dataset, list[Repair]]:
    """The attributes of RULES and SOURCE_RULES that are legal or could be made so, and what was done to the others.

    The returned data set is UTF-8 (ISO_IR 192) and independent of `source`. Raises Rejected, naming the attribute,
    only when an attribute without which no result can exist is missing or illegal.
    """
    repairs: list[Repair] = []
    header = Dataset()
    header.SpecificCharacterSet = "ISO_IR 192"
    for rule in (*RULES, *SOURCE_RULES):
        _apply(rule, source, header, repairs)
    return header, repairs


def copied_to_results(header: Dataset) -> Iterator[DataElement]:
    """The elements of a repaired header that belong into every result: patient and study."""
    for rule in RULES:
        if rule.keyword in header:
            yield header[rule.keyword]


def _apply(rule: Rule, source: Dataset, header: Dataset, repairs: list[Repair]) -> None:
    tag = tag_for_keyword(rule.keyword)
    if tag is None:
        raise ValueError(f"{rule.keyword} is no attribute of the DICOM dictionary")

    def note(action: str, reason: str) -> None:
        repairs.append(
            Repair(attribute=rule.keyword, tag=f"({tag >> 16:04X},{tag & 0xFFFF:04X})", action=action, reason=reason)
        )

    def give_up(reason: str) -> None:
        if rule.presence == "required":
            raise Rejected(
                f"{rule.keyword} ({tag >> 16:04X},{tag & 0xFFFF:04X}) of the source {reason}; without it no result "
                "can refer to the images: correct it at the sender and send the series again"
            )
        note("emptied" if rule.presence == "empty" else "dropped", reason)
        if rule.presence == "empty":
            header.add(DataElement(tag, dictionary_VR(tag), None))

    if tag not in source:
        if rule.presence != "optional":
            give_up("is missing")
        return
    vr = dictionary_VR(tag)
    if vr == "SQ":
        _apply_code_sequence(source, header, tag, note, give_up)
        return
    text = _text(source, tag, vr)
    if text is None:
        give_up("cannot be read")
        return
    cleaned = _CONTROL.sub("", text.replace("\t", " "))
    cleaned = cleaned.strip() if vr != "ST" else cleaned.rstrip()
    if cleaned != text.strip(" \0" if vr == "UI" else " "):  # NUL pads UIDs only
        note("cleaned", "has control characters or NUL bytes")
    if not cleaned:
        if rule.presence == "required":
            give_up("is empty")
        elif rule.presence == "empty":
            header.add(DataElement(tag, vr, None))
        return  # An empty optional attribute says nothing and is left out; nothing was lost.
    value, problem = _legal(vr, cleaned, rule)
    if value is None:
        give_up(problem)
        return
    if problem:
        note("kept" if value == cleaned else "shortened" if cleaned.startswith(value) else "replaced", problem)
    # Validation is ours: pydicom's would print the value.
    header.add(DataElement(tag, vr, value, validation_mode=config.IGNORE))


def _text(source: Dataset, tag: int, vr: str) -> str | None:
    """All values joined by backslashes, decoded; None where that fails."""
    try:
        # pydicom warns about odd character sets and values, with the value in the text.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            element = source.get_item(tag)
            if isinstance(element, RawDataElement):
                if element.value is None:
                    return ""
                if not isinstance(element.value, bytes):
                    return None
                encodings = source.original_character_set or "iso8859"
                if vr in ("DA", "TM", "UI", "CS", "IS", "DS", "AS"):
                    return element.value.decode("ascii")
                if vr == "PN":
                    element = convert_raw_data_element(element._replace(VR="PN"), encoding=encodings, ds=source)
                else:
                    names = [encodings] if isinstance(encodings, str) else list(encodings)
                    return decode_bytes(element.value, names, {"\\"})
            if element is None:
                return ""
            value = element.value
    except _UNREADABLE:
        return None
    if value is None:
        return ""
    values = value if isinstance(value, MultiValue | list | tuple) else [value]
    if any(isinstance(v, Dataset | bytes) for v in values):
        return None
    texts = []
    for v in values:
        if isinstance(v, PersonName):
            # Each component group decoded, unused groups at the end left out.
            texts.append("=".join(v.decode().components).rstrip("="))
        else:
            original = getattr(v, "original_string", None)
            texts.append(str(original if original is not None else v))
    return "\\".join(texts)


def _legal(vr: str, text: str, rule: Rule) -> tuple[str | None, str]:
    """(value, "") when legal; (value, what was wrong) when repaired or kept; (None, what is wrong)."""
    if vr in ("LO", "SH", "PN", "CS", "DA", "TM", "UI", "IS", "DS", "AS") and "\\" in text:
        if rule.keyword not in ("DeidentificationMethod", "SoftwareVersions", "StudyID"):
            if rule.identity:
                return None, "has several values where one is allowed"
            text, several = text.split("\\")[0].strip(), "has several values where one is allowed"
            value, problem = _legal(vr, text, rule) if text else (None, several)
            return value, problem or several
        text = text.replace("\\", " ")
    checked = _utc_offset if rule.keyword == "TimezoneOffsetFromUTC" else _CHECKS.get(vr)
    if checked is not None:
        value, problem = checked(text)
        if value is None:
            return None, problem
        if rule.enumerated and value not in rule.enumerated:
            return None, "is none of the defined values"
        return value, problem
    return _legal_text(vr, text, rule)


def _legal_text(vr: str, text: str, rule: Rule) -> tuple[str | None, str]:
    limit = 64 if vr == "PN" else _MAX_LENGTH.get(vr, 1024)
    longest = max(len(group) for group in text.split("=")) if vr == "PN" else len(text)
    if vr == "PN" and text.count("=") > 2:
        return (text, "has more than three component groups") if rule.identity else (None, "has too many groups")
    if longest <= limit:
        return text, ""
    problem = f"is longer than the {limit} characters that {vr} allows"
    if rule.identity:
        return text, problem
    if vr == "PN":
        return None, problem
    return text[:limit].rstrip(), problem


def _date(text: str) -> tuple[str | None, str]:
    value, problem = text, ""
    dotted = _DOT_DATE.fullmatch(text)
    if dotted:
        value, problem = "".join(dotted.groups()), "is written with dots, as before DICOM 3.0"
    try:
        if len(value) != 8 or not value.isascii() or not value.isdigit():
            raise ValueError
        datetime.strptime(value, "%Y%m%d")
    except ValueError:
        return None, "is no date (YYYYMMDD)"
    return value, problem


def _time(text: str) -> tuple[str | None, str]:
    colons = _COLON_TIME.fullmatch(text)
    value, problem = ("".join(colons.groups()), "is written with colons") if colons else (text, "")
    return (value, problem) if _TIME.fullmatch(value) else (None, "is no time (HHMMSS.FFFFFF)")


def _utc_offset(text: str) -> tuple[str | None, str]:
    minutes = int(text[:3]) * 60 + int(text[0] + text[3:]) if _OFFSET.fullmatch(text) else None
    legal = minutes is not None and -12 * 60 <= minutes <= 14 * 60 and text != "-0000"
    return (text, "") if legal else (None, "is no offset from UTC (&ZZXX)")


def _uid(text: str) -> tuple[str | None, str]:
    # Leading zeros break PS3.5 9.1 but are found in old archives, and a reference must match what is stored there.
    return (text, "") if len(text) <= 64 and _UID.fullmatch(text) else (None, "is no UID")


def _code_string(text: str) -> tuple[str | None, str]:
    value = text.upper()
    if len(value) > 16 or not re.fullmatch(r"[A-Z0-9 _]+", value):
        return None, "is no code string"
    return value, "" if value == text else "has lower case letters"


def _integer(text: str) -> tuple[str | None, str]:
    if re.fullmatch(r"[+-]?\d{1,11}", text) and abs(int(text)) < 1 << 31:
        return text, ""
    return None, "is no integer"


def _decimal(text: str) -> tuple[str | None, str]:
    return (text, "") if len(text) <= 16 and _DECIMAL.fullmatch(text) else (None, "is no decimal number")


def _age(text: str) -> tuple[str | None, str]:
    return (text, "") if re.fullmatch(r"\d{3}[DWMY]", text) else (None, "is no age")


_CHECKS: dict[str, Callable[[str], tuple[str | None, str]]] = {
    "DA": _date,
    "TM": _time,
    "UI": _uid,
    "CS": _code_string,
    "IS": _integer,
    "DS": _decimal,
    "AS": _age,
}


def _apply_code_sequence(
    source: Dataset,
    header: Dataset,
    tag: int,
    note: Callable[[str, str], None],
    give_up: Callable[[str], None],
) -> None:
    try:
        items = list(source[tag].value)
    except _UNREADABLE:
        give_up("cannot be read")
        return
    legal = [code for code in (_code_item(item) for item in items) if code is not None]
    if not legal:
        give_up("has no item with code value, scheme and meaning")
        return
    if len(legal) < len(items):
        note("shortened", "has items without code value, scheme or meaning")
    header.add(DataElement(tag, "SQ", DicomSequence(legal)))


def _code_item(item: object) -> Dataset | None:
    """A copy with value, scheme, scheme version and meaning; None for an item that is no code."""
    if not isinstance(item, Dataset):
        return None
    code = Dataset()
    limits = {"CodeValue": 16, "CodingSchemeDesignator": 16, "CodingSchemeVersion": 16, "CodeMeaning": 64}
    for keyword, limit in limits.items():
        tag = tag_for_keyword(keyword)
        if tag is None or tag not in item:
            continue
        text = _text(item, tag, dictionary_VR(tag))
        cleaned = _CONTROL.sub("", text).strip() if text else ""
        if cleaned and len(cleaned) <= limit:
            code.add(DataElement(tag, dictionary_VR(tag), cleaned, validation_mode=config.IGNORE))
    needed = ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")
    return code if all(keyword in code for keyword in needed) else None
