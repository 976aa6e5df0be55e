"""Which image series a file of labels was drawn on.

DICOM labels name it. The first of these that leads to a series in the source counts: the SOP instances that they refer
to, the series, the frame of reference. A frame of reference alone is weak (all series of an examination may share one),
so it counts only where one series has it. NIfTI labels name nothing: a Series Instance UID in the file's name counts,
else the nearest folder around the file that holds an image series, if it holds one only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from gateway.errors import Rejected
from gateway.training_data.label_objects import LabelObject
from gateway.training_data.source_scan import Source, SourceSeries

_REMEDY = "say in a --cases file which series it belongs to"
_MOST_NAMED = 4


class SeriesIndex:
    """The series of a source by what labels may name."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._by_instance: Mapping[str, str] = {
            instance: uid for uid, series in source.series.items() for instance in series.instances
        }

    def candidates(self, label: LabelObject) -> tuple[tuple[SourceSeries, ...], str | None]:
        """The series that the label was drawn on (several where it refers to images of several), and what a person
        should know of how they were found. Raises Rejected when there is none, or nothing decides between several."""
        if label.kind == "NIfTI":
            return (self._around(label.file),), None
        found = {self._by_instance[uid] for uid in label.instances if uid in self._by_instance}
        found = found or {uid for uid in label.series if uid in self._source.series}
        if found:
            return tuple(self._source.series[uid] for uid in sorted(found)), None
        sharing = [s for s in self._source.series.values() if s.frames_of_reference & label.frames_of_reference]
        same_study = [s for s in sharing if s.study_instance_uid == label.study_instance_uid]
        return tuple(same_study or sharing), (
            "the images that it refers to are not in the source; it was matched by its frame of reference"
        )

    def below(self, folder: Path) -> tuple[SourceSeries, ...]:
        """Series with a file in or below a folder."""
        inside = [s for s in self._source.series.values() if any(f.is_relative_to(folder) for f in s.files)]
        return tuple(inside)

    def _around(self, file: Path) -> SourceSeries:
        named = [s for uid, s in self._source.series.items() if uid in file.name]
        # A UID may be the beginning of another one.
        longest = [s for s in named if len(s.series_instance_uid) == max(len(n.series_instance_uid) for n in named)]
        if longest:
            return longest[0]
        for folder in file.parents:
            there = self.below(folder)
            if len(there) == 1:
                return there[0]
            if there:
                raise Rejected(f"{len(there)} series lie around it ({uids(there)}); {_REMEDY}")
            if folder == self._source.root:
                break
        raise Rejected(f"no image series lies around it; {_REMEDY}")


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
