"""Which image series a file of labels was drawn on.

DICOM labels name it. The first of these that leads to a series in the source counts: the SOP instances that they refer
to, the series. What lies in another frame of reference than its series, or names images that are not there, is refused:
a mask would land on another phase or position without a word. Where a label names no images its frame of reference
counts, if one series alone has it (all series of an examination may share one).

NIfTI labels name nothing: a Series Instance UID in the file's name counts, else the folder that the file lies in, or
the nearest one above that holds an image series, if it holds one only. The source itself counts for files that lie in
it. A name with the UID of other images, or with those of two series, is refused: the file was not drawn on what merely
lies beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from gateway.errors import Rejected
from gateway.training_data.label_objects import LabelObject
from gateway.training_data.source_scan import Source, SourceSeries

_REMEDY = "say in a --cases file which series it belongs to"
_MOST_NAMED = 4
_DOTTED = re.compile(r"[0-9]+(?:\.[0-9]+)+")
_LEAST_OF_UID = 5
_LONG_AS_UID = 20
"""Versions and dates have fewer numbers than this, and are shorter; 2.25.UUID has three."""


class SeriesIndex:
    """The series of a source by what labels may name."""

    def __init__(self, source: Source, *, ignores_references: bool = False) -> None:
        """ignores_references: frames of reference and references to images that are not there are no reason to refuse
        (sources whose anonymization changed UIDs apart)."""
        self._source = source
        self._ignores = ignores_references
        self._by_instance: Mapping[str, str] = {
            instance: uid for uid, series in source.series.items() for instance in series.instances
        }

    def candidates(self, label: LabelObject) -> tuple[tuple[SourceSeries, ...], str | None]:
        """The series that the label was drawn on (several where it refers to images of several), and what a person
        should know of how they were found. Raises Rejected when there is none, or nothing decides between several."""
        if label.kind == "NIfTI":
            return self._around(label.file)
        found = {self._by_instance[uid] for uid in label.instances if uid in self._by_instance}
        found = found or {uid for uid in label.series if uid in self._source.series}
        if found:
            series = tuple(self._source.series[uid] for uid in sorted(found))
            for one in series:
                self.check_frame(label, one)
            return series, None
        if (label.instances or label.series) and not self._ignores:
            raise Rejected(
                f"the images that it refers to are not in the source; add them, {_REMEDY}, or take it by its frame of "
                "reference (--ignore-references)"
            )
        sharing = [s for s in self._source.series.values() if s.frames_of_reference & label.frames_of_reference]
        same_study = [s for s in sharing if s.study_instance_uid == label.study_instance_uid]
        return tuple(same_study or sharing), (
            "the images that it refers to are not in the source; it was matched by its frame of reference"
        )

    def check_frame(self, label: LabelObject, series: SourceSeries) -> None:
        """Raises Rejected when labels and images lie in different frames of reference."""
        known = label.frames_of_reference, series.frames_of_reference
        if all(known) and not known[0] & known[1] and not self._ignores:
            raise Rejected(
                f"lies in another frame of reference than series {series.series_instance_uid}, so nothing says where; "
                "--ignore-references takes it by its coordinates all the same"
            )

    def below(self, folder: Path) -> tuple[SourceSeries, ...]:
        """Series with a file in or below a folder."""
        inside = [s for s in self._source.series.values() if any(f.is_relative_to(folder) for f in s.files)]
        return tuple(inside)

    def _around(self, file: Path) -> tuple[tuple[SourceSeries, ...], str | None]:
        dotted = dict.fromkeys(_DOTTED.findall(file.name))
        named = tuple(self._source.series[uid] for uid in dotted if uid in self._source.series)
        if len(named) > 1:
            raise Rejected(f"its name has the UIDs of {len(named)} series ({uids(named)}); {_REMEDY}")
        found, note = (named, None) if named else self._in_folder(file)
        own = {uid for s in found for uid in (s.series_instance_uid, s.study_instance_uid, *s.instances)}
        foreign = [uid for uid in dotted if uid not in own and _is_like_uid(uid)]
        if foreign and not self._ignores:
            (series,) = found
            raise Rejected(
                f"its name has the UID {foreign[0][:64]}, which is not of series {series.series_instance_uid}, its "
                f"study or its images; add the series that it was drawn on, {_REMEDY}, or take it all the same "
                "(--ignore-references)"
            )
        if foreign:
            note = "; ".join(filter(None, [note, "its name has a UID that is not of its series, study or images"]))
        return found, note

    def _in_folder(self, file: Path) -> tuple[tuple[SourceSeries, ...], str | None]:
        for folder in file.parents:
            is_own = folder == file.parent
            if folder == self._source.root and not is_own:
                break
            there = self.below(folder)
            if len(there) > 1:
                raise Rejected(f"{len(there)} series lie around it ({uids(there)}); {_REMEDY}")
            if there and not is_own and self._has_label_beside(there[0], file):
                raise Rejected(f"the only series around it, {uids(there)}, has labels of its own beside it; {_REMEDY}")
            if there:
                return there, None if is_own else f"matched with the only series in the folder {folder.name}"
            if folder == self._source.root:
                break
        raise Rejected(f"no image series lies around it; {_REMEDY}")

    def _has_label_beside(self, series: SourceSeries, file: Path) -> bool:
        folders = {image.parent for image in series.files}
        return any(
            label.kind == "NIfTI" and label.file != file and (label.file.parent in folders)
            for label in self._source.labels
        )


def _is_like_uid(dotted: str) -> bool:
    """PS3.5 9.1: the root is 0, 1 or 2, and no number begins with 0. A date with its time is none; what stands before
    the root (12.1.2.840...) does not count."""
    numbers = dotted.split(".")
    while numbers and numbers[0] not in {"0", "1", "2"}:
        numbers = numbers[1:]
    if any(len(number) > 1 and number[0] == "0" for number in numbers):
        return False
    return len(numbers) >= _LEAST_OF_UID or (len(numbers) > 2 and len(".".join(numbers)) >= _LONG_AS_UID)


def uids(series: Iterable[SourceSeries]) -> str:
    """Series Instance UIDs for a message."""
    found = [s.series_instance_uid for s in series]
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return ", ".join(found[:_MOST_NAMED]) + more


def the_one(candidates: tuple[SourceSeries, ...]) -> SourceSeries:
    """Raises Rejected when there is none or several."""
    if not candidates:
        raise Rejected(f"the images that it refers to are not in the source; add them, or {_REMEDY}")
    if len(candidates) > 1:
        raise Rejected(f"it may belong to {len(candidates)} series ({uids(candidates)}); {_REMEDY}")
    return candidates[0]
