"""Names that a routing rule may test; `attribute_values` reads what they have in an image.

An attribute is one of
- a keyword of the DICOM data dictionary (`SeriesDescription`) or its tag (`0008,103E`);
- a path through sequences (`RequestAttributesSequence.ScheduledProcedureStepID`): any item counts;
- a private element with its creator (`0019,xx0A:SIEMENS MR HEADER`, PS3.5 7.8.1);
- a fact that the gateway knows itself (`CallingAETitle`, `NumberOfInstances`, `SliceOrientation`, ...).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.tag import Tag

TEXT, NUMBER, DATE, TIME, AGE, WEEKDAY = "text", "number", "date", "time", "age", "weekday"

NUMBER_VRS = frozenset({"DS", "IS", "FL", "FD", "SS", "US", "SL", "UL", "SV", "UV"})
_TEXT_VRS = frozenset({"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UI", "UR", "UT"})

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

_PRIVATE = re.compile(r"^\(?([0-9A-Fa-f]{4}),xx([0-9A-Fa-f]{2})\)?:(.{1,64})$")
_TAG = re.compile(r"^\(?([0-9A-Fa-f]{4}),([0-9A-Fa-f]{4})\)?$")
_MAX_PATH = 8


class AttributeUnknown(ValueError):
    """No such attribute; the message names it and suggests the nearest known ones."""


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


def parse_attribute(name: str, vr: str | None = None) -> Attribute:
    """Resolve a name; `vr` tells how a private element is read when the sender did not state its VR.

    Raises AttributeUnknown, with the nearest known names where there are any.
    """
    if vr is not None and vr not in NUMBER_VRS | _TEXT_VRS:
        raise AttributeUnknown(f"vr {vr!r}: expected one of {', '.join(sorted(NUMBER_VRS | _TEXT_VRS))}")
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
    kind = NUMBER if read_as in NUMBER_VRS else TEXT
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
    if first in NUMBER_VRS:
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
