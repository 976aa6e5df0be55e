"""The values that an attribute of a routing rule has in an image.

An image is an object, or one frame of an enhanced multi-frame object. For a frame the per-frame functional groups are
asked first, then the shared ones, then the top level (PS3.3 C.7.6.16).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydicom.dataset import Dataset

from gateway.intake.attributes import AGE, DATE, NUMBER, NUMBER_VRS, TIME, WEEKDAYS, Attribute
from gateway.intake.header import PARSER_ERRORS

# Of private elements, what these hold is a number or a code and never prose.
_SHOWN_VRS = NUMBER_VRS | {"CS", "UI"}
_BINARY_FORMATS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d", "UV": "Q", "SV": "q"}
# Further than 30 degrees from every patient axis is oblique.
_DOMINANT_COSINE = math.cos(math.radians(30.0))


class PrivateText(str):
    """Text of a private element: nobody but its vendor knows whether it names a patient, so it is never shown."""

    __slots__ = ()


class ValueUnreadable(ValueError):
    """The element is there, but its value cannot be read as its VR says. No value is part of the message."""


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


def values_of(image: Image, attribute: Attribute) -> tuple[Any, ...]:
    """All values of an attribute in one image, each already of its kind; empty where absent or without a value.

    Numbers are float, times are seconds of the day, dates are ISO text, ages are years, the rest is text: PrivateText
    where a private element holds neither a number nor a code.
    Raises ValueUnreadable where the element exists but its value does not fit its VR.
    """
    if attribute.fact is not None:
        return _fact(image, attribute.fact)
    for roots in image.roots:
        found = [raw for root in roots for raw in _raw(root, attribute)]
        if found:
            return tuple(v for raw, vr in found for v in _typed(raw, vr, attribute))
    return ()


def _raw(root: Dataset, attribute: Attribute) -> Iterator[tuple[Any, str]]:
    """The raw values below one root, each a single value, with the VR that the sender stated."""
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
            value, vr = item.value, str(item.VR)
            if value is None or (isinstance(value, str | bytes) and not value):
                continue
            if isinstance(value, str | bytes) or not isinstance(value, Sequence):
                yield value, vr
            else:
                yield from ((v, vr) for v in value if v is not None and v != "")
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


def _typed(raw: Any, vr: str, attribute: Attribute) -> Iterator[Any]:
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
            yield text if _may_be_shown(attribute, vr) else PrivateText(text)


def _may_be_shown(attribute: Attribute, vr: str) -> bool:
    return attribute.private is None or vr in _SHOWN_VRS


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
        if not stripped:
            continue
        if attribute.kind == NUMBER:
            yield _number(stripped, attribute)
        else:
            yield stripped if _may_be_shown(attribute, attribute.vr) else PrivateText(stripped)


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
