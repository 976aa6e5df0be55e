"""Names that a routing rule may test, and how their values are read from a header.

An attribute is one of
- a keyword of the DICOM data dictionary (`SeriesDescription`) or its tag (`0008,103E`);
- a path through sequences (`RequestAttributesSequence.ScheduledProcedureStepID`): any item counts;
- a private element with its creator (`0019,xx0A:SIEMENS MR HEADER`, PS3.5 7.8.1);
- a fact that the gateway knows itself (`CallingAETitle`, `NumberOfInstances`, `SliceOrientation`, ...).

What is tested is an image: an object, or one frame of an enhanced multi-frame object. For a frame the per-frame
functional groups are asked first, then the shared ones, then the top level (PS3.3 C.7.6.16).
"""

from __future__ import annotations

import difflib
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from gateway.intake.header import PARSER_ERRORS

TEXT, NUMBER, DATE, TIME, AGE, WEEKDAY = "text", "number", "date", "time", "age", "weekday"

_NUMBER_VRS = frozenset({"DS", "IS", "FL", "FD", "SS", "US", "SL", "UL", "SV", "UV"})
_TEXT_VRS = frozenset({"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UI", "UR", "UT"})
_BINARY_FORMATS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d", "UV": "Q", "SV": "q"}

# Facts of ours. The value kind decides which operators fit. `per_series` facts have one value for the whole series.
OWN_FACTS: Mapping[str, tuple[str, bool]] = {
    "CallingAETitle": (TEXT, False),
    "CalledAETitle": (TEXT, False),
    "PeerAddress": (TEXT, False),
    "ReceivedTime": (TIME, False),
    "ReceivedDate": (DATE, False),
    "ReceivedWeekday": (WEEKDAY, False),
    "SliceOrientation": (TEXT, False),
    "NumberOfInstances": (NUMBER, True),
    "NumberOfImages": (NUMBER, True),
    "ModalitiesInStudy": (TEXT, True),
    "NumberOfStudyRelatedSeries": (NUMBER, True),
}
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")

# Of group 0010 only these say nothing about who the patient is; all others, all person names, and the listed
# identifiers of other groups are never copied into an explanation.
_NOT_IDENTIFYING = frozenset({0x00100040, 0x00101010, 0x00101020, 0x00101030})
_IDENTIFYING = frozenset({0x00080050, 0x00200010, 0x00380010, 0x00400009, 0x00401001, 0x00402016, 0x00402017})

# Further than 30 degrees from every patient axis is oblique.
_DOMINANT_COSINE = math.cos(math.radians(30.0))
_PRIVATE = re.compile(r"^\(?([0-9A-Fa-f]{4}),xx([0-9A-Fa-f]{2})\)?:(.{1,64})$")
_TAG = re.compile(r"^\(?([0-9A-Fa-f]{4}),([0-9A-Fa-f]{4})\)?$")
_MAX_PATH = 8


class AttributeUnknown(ValueError):
    """No such attribute; the message names it and suggests the nearest known ones."""


class ValueUnreadable(ValueError):
    """The element is there, but its value cannot be read as its VR says. No value is part of the message."""


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One name, resolved. `name` is as written in the rule; `kind` is one of the kinds above."""

    name: str
    kind: str
    vr: str
    path: tuple[int, ...] = ()  # tags from the outside in; empty for private elements and own facts
    private: tuple[int, int, str] | None = None  # group, element within the block, creator
    fact: str | None = None
    per_series: bool = False
    identifying: bool = False


@dataclass(frozen=True, kw_only=True)
class InstanceFacts:
    """What the gateway knows of one received object besides its header."""

    calling_ae: str
    called_ae: str
    peer_address: str
    received_at: datetime


@dataclass(frozen=True, kw_only=True)
class SeriesHeaders:
    """One series as routing sees it: a header without pixel data and the facts, per object, in the same order."""

    series_instance_uid: str
    datasets: tuple[Dataset, ...]
    facts: tuple[InstanceFacts, ...]
    modalities_in_study: tuple[str, ...] = ()
    number_of_study_related_series: int = 0

    def __post_init__(self) -> None:
        if len(self.datasets) != len(self.facts):
            raise ValueError(f"{len(self.datasets)} headers, but facts for {len(self.facts)} objects")


@dataclass(frozen=True, kw_only=True)
class Image:
    """One object, or one frame of an enhanced multi-frame object. `roots` run from the most specific outwards."""

    roots: tuple[tuple[Dataset, ...], ...]
    facts: InstanceFacts


def images(series: SeriesHeaders) -> tuple[Image, ...]:
    """Every image of the series; an enhanced object gives one per item of its per-frame functional groups.

    Raises ValueUnreadable where the functional groups cannot be read.
    """
    try:
        return tuple(
            image for dataset, facts in zip(series.datasets, series.facts, strict=True) for image in _of(dataset, facts)
        )
    except PARSER_ERRORS as error:
        if isinstance(error, ValueUnreadable):
            raise
        raise ValueUnreadable(f"the functional groups cannot be read ({type(error).__name__})") from error


def _of(dataset: Dataset, facts: InstanceFacts) -> Iterator[Image]:
    top = (dataset,)
    shared = tuple(d for item in _items(dataset, "SharedFunctionalGroupsSequence") for d in _macros(item))
    frames = _items(dataset, "PerFrameFunctionalGroupsSequence")
    if not frames:
        yield Image(roots=(shared, top) if shared else (top,), facts=facts)
    for frame in frames:
        yield Image(roots=(tuple(_macros(frame)), shared, top), facts=facts)


def _macros(group: Dataset) -> Iterator[Dataset]:
    """The functional group item itself and the items of each of its macros."""
    yield group
    for element in group:
        if element.VR == "SQ":
            yield from element.value or ()


def _items(dataset: Dataset, keyword: str) -> Sequence[Dataset]:
    """The items of a sequence; raises ValueUnreadable where the element is something else."""
    value = dataset.get(keyword)
    if value is None:
        return ()
    if not isinstance(value, Sequence) or not all(isinstance(item, Dataset) for item in value):
        raise ValueUnreadable(f"{keyword} is not a sequence of items")
    return value


def parse_attribute(name: str, vr: str | None = None) -> Attribute:
    """Resolve a name; `vr` tells how a private element is read when the sender did not state its VR.

    Raises AttributeUnknown, with the nearest known names where there are any.
    """
    if vr is not None and vr not in _NUMBER_VRS | _TEXT_VRS:
        raise AttributeUnknown(f"vr {vr!r}: expected one of {', '.join(sorted(_NUMBER_VRS | _TEXT_VRS))}")
    private = _PRIVATE.match(name)
    if private:
        return _private(name, private, vr)
    if vr is not None:
        raise AttributeUnknown(f"attribute {name!r}: vr is for private elements only; the dictionary knows this one")
    if name in OWN_FACTS:
        kind, per_series = OWN_FACTS[name]
        return Attribute(name=name, kind=kind, vr="", fact=name, per_series=per_series)
    parts = name.split(".")
    if len(parts) > _MAX_PATH:
        raise AttributeUnknown(f"attribute {name!r}: more than {_MAX_PATH} levels")
    tags = tuple(_known_tag(part, name) for part in parts)
    for tag, part in zip(tags[:-1], parts[:-1], strict=True):
        if dictionary_VR(tag) != "SQ":
            raise AttributeUnknown(f"attribute {name!r}: {part} is not a sequence, nothing can be inside it")
    last_vr = dictionary_VR(tags[-1])
    return Attribute(
        name=name, kind=_kind(last_vr, name), vr=last_vr, path=tags, identifying=any(map(_is_identifying, tags))
    )


def _private(name: str, match: re.Match[str], vr: str | None) -> Attribute:
    group, element, creator = int(match[1], 16), int(match[2], 16), match[3].strip()
    if group % 2 == 0:
        raise AttributeUnknown(f"attribute {name!r}: private groups are odd (PS3.5 7.8), {match[1]} is even")
    read_as = vr or "LO"
    kind = NUMBER if read_as in _NUMBER_VRS else TEXT
    return Attribute(name=name, kind=kind, vr=vr or "", private=(group, element, creator))


def _known_tag(part: str, name: str) -> int:
    tag_text = _TAG.match(part)
    if tag_text:
        tag = Tag(int(tag_text[1], 16), int(tag_text[2], 16))
        if tag.is_private:
            raise AttributeUnknown(
                f"attribute {name!r}: a private element needs its creator, as in '{tag_text[1]},xx{tag_text[2][2:]}"
                ":SIEMENS MR HEADER'"
            )
        if not keyword_for_tag(tag):
            raise AttributeUnknown(f"attribute {name!r}: the tag {tag} is not in the DICOM data dictionary")
        return int(tag)
    found = tag_for_keyword(part)
    if found is None:
        raise AttributeUnknown(f"unknown attribute {part!r}{_suggestion(part)}")
    return int(found)


def _suggestion(part: str) -> str:
    known = [*OWN_FACTS, *(entry[4] for entry in DicomDictionary.values() if entry[4])]
    folded = {k.lower(): k for k in known}
    near = difflib.get_close_matches(part.replace(" ", "").replace("'", "").lower(), folded, n=2, cutoff=0.8)
    if not near:
        return "; names are keywords of the DICOM data dictionary (PS3.6), for example SeriesDescription"
    return "; did you mean " + " or ".join(folded[n] for n in near) + "?"


def _kind(vr: str, name: str) -> str:
    first = vr.split(" or ")[0]
    if first in _NUMBER_VRS:
        return NUMBER
    if first in _TEXT_VRS:
        return TEXT
    kinds = {"DA": DATE, "TM": TIME, "AS": AGE}
    if first in kinds:
        return kinds[first]
    if first == "SQ":
        raise AttributeUnknown(f"attribute {name!r} is a sequence; name what is inside, as in {name}.CodeValue")
    raise AttributeUnknown(f"attribute {name!r} has VR {vr}, which rules cannot test")


def _is_identifying(tag: int) -> bool:
    if tag in _IDENTIFYING or dictionary_VR(tag) == "PN":
        return True
    return tag >> 16 == 0x0010 and tag not in _NOT_IDENTIFYING


def values_of(image: Image, attribute: Attribute) -> tuple[Any, ...]:
    """All values of an attribute in one image, each already of its kind; empty where absent or without a value.

    Numbers are float, times are seconds of the day, dates are ISO text, ages are years, the rest is text.
    Raises ValueUnreadable where the element exists but its value does not fit its VR.
    """
    if attribute.fact is not None:
        return _fact(image, attribute.fact)
    for roots in image.roots:
        found = [raw for root in roots for raw in _raw(root, attribute)]
        if found:
            return tuple(v for raw in found for v in _typed(raw, attribute))
    return ()


def _raw(root: Dataset, attribute: Attribute) -> Iterator[Any]:
    """The raw values below one root: each is a single value."""
    try:
        if attribute.private is not None:
            group, element, creator = attribute.private
            try:
                block = root.private_block(group, creator)
            except KeyError:
                return
            if element not in block:
                return
            found = [block[element]]
        else:
            found = _walk(root, attribute.path)
        for item in found:
            value = item.value
            if value is None or (isinstance(value, str | bytes) and not value):
                continue
            if isinstance(value, str | bytes) or not isinstance(value, Sequence):
                yield value
            else:
                yield from (v for v in value if v is not None and v != "")
    except PARSER_ERRORS as error:
        raise ValueUnreadable(f"{attribute.name} cannot be read ({type(error).__name__})") from error


def _walk(root: Dataset, path: tuple[int, ...]) -> list[Any]:
    if path[0] not in root:
        return []
    element = root[path[0]]
    if len(path) == 1:
        return [element]
    if element.VR != "SQ":
        raise ValueError("not a sequence")
    return [found for item in element.value or () for found in _walk(item, path[1:])]


def _typed(raw: Any, attribute: Attribute) -> Iterator[Any]:
    if isinstance(raw, bytes):
        yield from _from_bytes(raw, attribute)
        return
    if attribute.kind == NUMBER:
        yield _number(raw, attribute)
    elif attribute.kind == DATE:
        yield date_text(str(raw).strip(), attribute.name)
    elif attribute.kind == TIME:
        yield seconds_of_day(str(raw).strip(), attribute.name)
    elif attribute.kind == AGE:
        yield _years(str(raw).strip(), attribute.name)
    else:
        text = str(raw).strip(" \0")
        if text:
            yield text


def _from_bytes(raw: bytes, attribute: Attribute) -> Iterator[Any]:
    """A value whose VR the sender did not state (UN): read as the rule's `vr` says (PS3.5 6.2.2: little endian)."""
    if not attribute.vr:
        raise ValueUnreadable(f'{attribute.name} came without a VR; say how to read it with vr = "..."')
    if attribute.vr in _BINARY_FORMATS:
        code = _BINARY_FORMATS[attribute.vr]
        if len(raw) % struct.calcsize(f"<{code}"):
            raise ValueUnreadable(f"{attribute.name}: {len(raw)} bytes are not a whole number of {attribute.vr} values")
        yield from (float(v) for (v,) in struct.iter_unpack(f"<{code}", raw))
        return
    try:
        text = raw.decode("ascii")
    except UnicodeDecodeError as error:
        raise ValueUnreadable(f"{attribute.name}: not text, although vr = {attribute.vr!r} says so") from error
    for part in text.split("\\"):
        stripped = part.strip(" \0")
        if stripped:
            yield _number(stripped, attribute) if attribute.kind == NUMBER else stripped


def _number(raw: Any, attribute: Attribute) -> float:
    try:
        number = float(raw)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueUnreadable(f"{attribute.name} is not a number") from error
    if not math.isfinite(number):
        raise ValueUnreadable(f"{attribute.name} is not a finite number")
    return number


def date_text(text: str, name: str) -> str:
    """`20200121` or `2020-01-21` as `2020-01-21`; raises ValueUnreadable."""
    digits = text.replace("-", "").replace(".", "")
    try:
        return datetime.strptime(digits, "%Y%m%d").date().isoformat()
    except ValueError as error:
        raise ValueUnreadable(f"{name} is not a date") from error


def seconds_of_day(text: str, name: str) -> float:
    """`074807.5`, `0748` or `07:48` as seconds since midnight; raises ValueUnreadable."""
    match = re.fullmatch(r"(\d\d):?(\d\d)?(?::?(\d\d)(\.\d{1,6})?)?", text)
    if not match:
        raise ValueUnreadable(f"{name} is not a time of day")
    hours, minutes, seconds = int(match[1]), int(match[2] or 0), int(match[3] or 0)
    if hours > 23 or minutes > 59 or seconds > 60:
        raise ValueUnreadable(f"{name} is not a time of day")
    return hours * 3600 + minutes * 60 + seconds + float(match[4] or 0)


def _years(text: str, name: str) -> float:
    match = re.fullmatch(r"(\d{3})([DWMY])", text)
    if not match:
        raise ValueUnreadable(f"{name} is not an age string (PS3.5 6.2: nnnD, nnnW, nnnM, nnnY)")
    return int(match[1]) * {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}[match[2]]


def _fact(image: Image, fact: str) -> tuple[Any, ...]:
    facts = image.facts
    local = facts.received_at
    if fact == "SliceOrientation":
        return _orientation(image)
    known: dict[str, Any] = {
        "CallingAETitle": facts.calling_ae.strip(),
        "CalledAETitle": facts.called_ae.strip(),
        "PeerAddress": facts.peer_address,
        "ReceivedTime": local.hour * 3600 + local.minute * 60 + local.second + local.microsecond / 1e6,
        "ReceivedDate": local.date().isoformat(),
        "ReceivedWeekday": WEEKDAYS[local.weekday()],
    }
    return (known[fact],)


def series_fact(series: SeriesHeaders, fact: str, number_of_images: int) -> tuple[Any, ...]:
    """The values of a fact that holds for the series as a whole."""
    known: dict[str, tuple[Any, ...]] = {
        "NumberOfInstances": (float(len(series.datasets)),),
        "NumberOfImages": (float(number_of_images),),
        "ModalitiesInStudy": series.modalities_in_study,
        "NumberOfStudyRelatedSeries": (float(series.number_of_study_related_series),),
    }
    return known[fact]


_ORIENTATION = Attribute(name="ImageOrientationPatient", kind=NUMBER, vr="DS", path=(0x00200037,))


def _orientation(image: Image) -> tuple[str, ...]:
    """axial, sagittal, coronal or oblique, from the slice normal (PS3.3 C.7.6.2.1.1); empty without orientation."""
    cosines = values_of(image, _ORIENTATION)
    if not cosines:
        return ()
    if len(cosines) != 6:
        raise ValueUnreadable(f"ImageOrientationPatient has {len(cosines)} values instead of 6")
    (a, b, c), (d, e, f) = cosines[:3], cosines[3:]
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    length = math.sqrt(sum(n * n for n in normal))
    if length < 0.5:
        raise ValueUnreadable("ImageOrientationPatient: row and column are not at right angles")
    sizes = [abs(n) / length for n in normal]
    largest = max(range(3), key=sizes.__getitem__)
    return (("sagittal", "coronal", "axial")[largest] if sizes[largest] >= _DOMINANT_COSINE else "oblique",)
