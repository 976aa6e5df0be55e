"""Which cases a source makes: the series of each channel, and the labels that were drawn on them.

Without a list, every series that labels belong to is a case; with several channels it is every study that has labels,
with the one series that each channel takes. Labels of several files join into one case. What does not fit is a fault of
its case and stops no other.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gateway.errors import Rejected
from gateway.training_data.case_list import ListedCase
from gateway.training_data.channels import Channel
from gateway.training_data.faults import FAULT_ERRORS, Fault
from gateway.training_data.label_names import LabelTable, folded
from gateway.training_data.label_objects import LabelObject, Structure, read_label_object
from gateway.training_data.series_matching import SeriesIndex, the_one, uids
from gateway.training_data.source_scan import Source, SourceSeries, shown

_LEAST_TELLING = 3
_MOST_NAMED = 4
_SPELT = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa", "æ": "ae"})
"""How letters are written where there are no others than A to Z."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A case without its pseudonym. `series` in the order of the channels; `listed` and `patient` are what a list calls
    case and patient; `joins`: several files may draw the same label."""

    series: tuple[SourceSeries, ...]
    labels: tuple[LabelObject, ...]
    listed: str | None = None
    patient: str | None = None
    joins: bool = False

    @property
    def key(self) -> str:
        """The same for the same series."""
        return "|".join(series.series_instance_uid for series in self.series)


@dataclass(kw_only=True)
class Drafts:
    """What planning found so far; `notes` are what a person should know, by the file or series concerned."""

    cases: list[Draft] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


def draft_cases(source: Source, channels: Sequence[Channel], *, ignores_references: bool = False) -> Drafts:
    """From what the labels say. channels: empty for one channel of whatever series has labels. ignores_references: as
    in `SeriesIndex`."""
    index, drafts = SeriesIndex(source, ignores_references=ignores_references), Drafts()
    found: dict[str, tuple[tuple[SourceSeries, ...], list[LabelObject]]] = {}
    for label in source.labels:
        file = shown(label.file, source.root)
        try:
            candidates, note = index.candidates(label)
            if channels:
                wanted = tuple(s for s in candidates if any(channel.takes(s) for channel in channels))
                if candidates and not wanted:
                    drafts.notes.append((file, "left out: no channel takes the series that it was drawn on"))
                    continue
                series = _of_channels(source, wanted, channels)
            else:
                series = (the_one(candidates),)
        except Rejected as error:
            drafts.faults.append(Fault(case=None, file=file, cause=str(error)))
            continue
        if note:
            drafts.notes.append((file, note))
        key = "|".join(s.series_instance_uid for s in series)
        found.setdefault(key, (series, []))[1].append(label)
    drafts.cases = [Draft(series=series, labels=tuple(labels)) for series, labels in found.values()]
    return drafts


def draft_listed(
    source: Source,
    listed: Iterable[ListedCase],
    folder: Path,
    channels: Sequence[Channel],
    *,
    ignores_references: bool = False,
) -> Drafts:
    """From a list in `folder`, which says what belongs together: references to other images do not count, another frame
    of reference does."""
    index, drafts = SeriesIndex(source, ignores_references=ignores_references), Drafts()
    known = {label.file.resolve(): label for label in source.labels}
    taken: dict[str, str] = {}
    for entry in listed:
        problems: list[str] = []
        series = [s for text in entry.series if (s := _listed_series(index, source, folder, text, problems))]
        labels = [f for text in entry.labels if (f := _listed_label(known, source.root, folder, text, problems))]
        if len(entry.series) != max(1, len(channels)):
            problems.append(
                f"{len(entry.series)} series for {max(1, len(channels))} channel(s); name all with --channel"
            )
        else:
            problems += [
                f"the channel {channel.name} does not take series {s.series_instance_uid}"
                for channel, s in zip(channels, series, strict=False)
                if not channel.takes(s)
            ]
        if not problems:
            problems += [problem for label in labels for s in series if (problem := _frame_problem(index, label, s))]
        draft = Draft(series=tuple(series), labels=tuple(labels), listed=entry.case, patient=entry.patient, joins=True)
        if not problems and taken.setdefault(draft.key, entry.where) != entry.where:
            problems.append(f"its series are already a case ({taken[draft.key]}); list all labels in one entry")
        if entry.case is not None and any(_identifies(entry.case, s, labels) for s in series):
            problems.append(
                "its name holds the patient's identifier, a part of their name or a UID; give another, or none"
            )
        drafts.faults += [Fault(case=None, file=entry.where, cause=problem) for problem in problems]
        if not problems:
            drafts.cases.append(draft)
    return drafts


def _frame_problem(index: SeriesIndex, label: LabelObject, series: SourceSeries) -> str | None:
    try:
        index.check_frame(label, series)
    except Rejected as error:
        return f"label {label.file.name}: {error}"
    return None


def chosen_values(
    draft: Draft, table: LabelTable, root: Path, *, ignores_references: bool = False
) -> tuple[Mapping[int, int], ...]:
    """For each file of labels: number of the structure → value. Raises Rejected where none is taken, two files draw the
    same label and were not listed together, two structures of one file have one name and no pattern takes both, or one
    lies in another frame of reference than the images (unless `ignores_references`)."""
    chosen: list[dict[int, int]] = []
    drawn: dict[int, Path] = {}
    for label in draft.labels:
        values = {s.number: value for s in label.structures if (value := table.value(s.name)) is not None}
        _check_names(label, values, table, root)
        if not ignores_references:
            _check_frames(label, values, draft.series, root)
        chosen.append(values)
        for value in set(values.values()):
            other = drawn.setdefault(value, label.file)
            if other != label.file and not draft.joins:
                raise Rejected(
                    f"{shown(label.file, root)} and {shown(other, root)} both draw {table.name(value)!r}; choose one "
                    "of them, or list both, in a --cases file"
                )
    if not drawn:
        names = Counter(s.name for label in draft.labels for s in label.structures)
        there = ", ".join(repr(name) for name in list(names)[:8]) or "nothing"
        raise Rejected(f"none of the labels is drawn; there is {there}")
    return tuple(chosen)


def _check_names(label: LabelObject, values: Mapping[int, int], table: LabelTable, root: Path) -> None:
    """Two structures of one name may be one organ in two parts, or two organs, or an old version and a new one."""
    same: dict[str, list[Structure]] = {}
    for structure in label.structures:
        if structure.number in values:
            same.setdefault(folded(structure.name), []).append(structure)
    for found in same.values():
        first = found[0]
        if len(found) > 1 and not table.labels[values[first.number] - 1].gathers(first.name):
            what = "ROIs" if label.kind == "RTSTRUCT" else "segments"
            numbers = f"{', '.join(str(s.number) for s in found[:-1])} and {found[-1].number}"
            raise Rejected(
                f"{shown(label.file, root)}: {what} {numbers} have one name, {first.name!r}; name them apart, or take "
                f"them as one label by a pattern: --label '{table.name(values[first.number])}={first.name}*'"
            )


def _check_frames(label: LabelObject, values: Mapping[int, int], series: Sequence[SourceSeries], root: Path) -> None:
    """One RTSTRUCT may hold ROIs of several scanners, each in its own coordinates."""
    for one in series:
        known = one.frames_of_reference
        apart = [
            s for s in label.structures if s.number in values and known and s.frame_of_reference not in ("", *known)
        ]
        if apart:
            names = ", ".join(f"{s.number} ({s.name!r})" for s in apart[:_MOST_NAMED])
            more = f" and {len(apart) - _MOST_NAMED} more" if len(apart) > _MOST_NAMED else ""
            raise Rejected(
                f"{shown(label.file, root)}: ROI {names}{more}: another frame of reference than series "
                f"{one.series_instance_uid}, so nothing says where; choose others with --label, or take all by their "
                "coordinates (--ignore-references)"
            )


def _of_channels(
    source: Source, labelled: tuple[SourceSeries, ...], channels: Sequence[Channel]
) -> tuple[SourceSeries, ...]:
    """The series of each channel in the study of the labelled one. Raises Rejected naming the channel without a series,
    or with several."""
    study = {s.study_instance_uid for s in labelled}
    if len(study) != 1:
        the_one(labelled)
    of_study = [s for s in source.series.values() if s.study_instance_uid in study]
    chosen = []
    for channel in channels:
        taken = [s for s in labelled if channel.takes(s)] or [s for s in of_study if channel.takes(s)]
        if len(taken) != 1:
            which = f": {uids(taken)}" if taken else ""
            raise Rejected(
                f"channel {channel.name} takes {len(taken) or 'no'} series of the study{which}; one is needed (narrow "
                "--channel NAME=MODALITY:DESCRIPTION, or list the case in a --cases file)"
            )
        chosen.append(taken[0])
    if len({s.series_instance_uid for s in chosen}) != len(chosen):
        raise Rejected("one series is taken by two channels; narrow --channel NAME=MODALITY:DESCRIPTION")
    return tuple(chosen)


def _listed_series(
    index: SeriesIndex, source: Source, folder: Path, text: str, problems: list[str]
) -> SourceSeries | None:
    if text in source.series:
        return source.series[text]
    for base in (source.root, folder):
        if (base / text).is_dir():
            there = index.below((base / text).resolve()) or index.below(base / text)
            if len(there) == 1:
                return there[0]
            what = f"{len(there)} series ({uids(there)})" if there else "no image series"
            problems.append(f"folder {text} holds {what}; give the Series Instance UID")
            return None
    problems.append(f"series {text}: no such Series Instance UID or folder in the source")
    return None


def _listed_label(
    known: Mapping[Path, LabelObject], root: Path, folder: Path, text: str, problems: list[str]
) -> LabelObject | None:
    for base in (root, folder):
        file = base / text
        if file.is_file():
            try:
                return known.get(file.resolve()) or read_label_object(file)
            except FAULT_ERRORS as error:
                problems.append(f"label {text}: {error}")
                return None
    problems.append(f"label {text}: no such file")
    return None


def _identifies(name: str, series: SourceSeries, labels: Sequence[LabelObject]) -> bool:
    """Whether a case's name, which becomes a file's name, tells the patient: holds PatientID (of labels where images
    have none), a part of PatientName or a UID, whatever the capitals, accents and separators. What is shorter than
    three characters would be anywhere."""
    of_labels = (label.patient_id for label in labels)
    ids = (series.patient_id, series.study_instance_uid, series.series_instance_uid, *of_labels)
    if any(text and name.casefold() == text.casefold() for text in ids):
        return True
    parts = [part for part in re.split(r"[\W_]+", series.patient_name) if part]
    told = {_plain(text) for text in (*ids, *parts, "".join(parts))}
    told |= {_plain(text.casefold().translate(_SPELT)) for text in (*parts, "".join(parts))}
    return any(len(text) >= _LEAST_TELLING and text in _plain(name) for text in told)


def _plain(text: str) -> str:
    """Letters and digits alone, without accents and capitals."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if c.isalnum())
