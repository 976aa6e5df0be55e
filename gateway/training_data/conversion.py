"""DICOM series and labels → a raw dataset of nnU-Net, in two passes: what there is, then case after case.

    source ─▶ prepare: scan ▸ cases ▸ labels ▸ pseudonyms ─▶ convert: case by case ─▶ dataset.json

dataset.json is written last, when every case is there: until then nothing can be trained on a part of the cases by
accident. All that is wrong is found before it is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.dataset import DATASET_JSON, IMAGES, LABELS
from engine.errors import ImportRefused
from engine.json_reader import read_json
from engine.json_writer import write_json
from engine.labels import LabelManager
from engine.parallel import Progress, map_cases
from engine.volume import check_orientation
from gateway.errors import Rejected
from gateway.training_data.case_conversion import (
    ENDING,
    RECORDS,
    CaseJob,
    CaseResult,
    ConversionRules,
    case_files,
    convert_case,
    is_made,
    record_file,
)
from gateway.training_data.case_list import read_case_list
from gateway.training_data.case_planning import Draft, Drafts, chosen_values, draft_cases, draft_listed
from gateway.training_data.channels import Channel, channel_of_modality
from gateway.training_data.contour_masks import BetweenSlices
from gateway.training_data.faults import Fault
from gateway.training_data.identities import Identities, NamedCase
from gateway.training_data.label_names import IGNORE, LabelTable, table_of_names
from gateway.training_data.label_objects import LabelObject
from gateway.training_data.label_painting import Overlap
from gateway.training_data.source_scan import Source, scan

_DATASET_NAME = re.compile(r"Dataset\d{3}_[A-Za-z0-9_.-]+")
_SETTINGS = "settings"  # no case is called so: their files end in .json


class NothingToConvert(Rejected):
    """No case can be made. `faults` were found besides."""

    def __init__(self, cause: str, faults: tuple[Fault, ...]) -> None:
        super().__init__(cause)
        self.faults = faults


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """What is asked for. channels: empty for one of the modality that is found. table: None for all names that are
    found. cases: a list (`case_list`). nifti: pattern of the names of label maps. skip_faulty: the dataset is finished
    without cases that have faults. ignores_references: labels of another frame of reference, of another PatientID, or
    that name images that are not there, are taken by their coordinates."""

    source: Path
    folder: Path
    identities: Path
    channels: tuple[Channel, ...] = ()
    table: LabelTable | None = None
    cases: Path | None = None
    nifti: str | None = None
    overlap: Overlap = "refuse"
    between: BetweenSlices = "refuse"
    threshold: float = 0.5
    orientation: str = "LPS"
    skip_faulty: bool = False
    ignores_references: bool = False


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What will be converted. `jobs` are free of faults so far; `named` are all cases that were found."""

    options: ConversionOptions
    source: Source
    channels: tuple[Channel, ...]
    table: LabelTable
    identities: Identities
    named: tuple[NamedCase, ...]
    gone: tuple[str, ...]
    jobs: tuple[CaseJob, ...]
    faults: tuple[Fault, ...]
    notes: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """`cases` are in the dataset, `made` of them were written now. `document` is dataset.json's content, None when it
    was not written. `notes` belong to a case or file."""

    cases: tuple[str, ...]
    made: int
    document: Mapping[str, Any] | None
    faults: tuple[Fault, ...]
    notes: tuple[tuple[str, str], ...]


def prepare(options: ConversionOptions, *, processes: int, progress: Progress | None = None) -> Prepared:
    """Reads headers and decides; writes nothing. Raises Rejected when nothing can be converted as asked, OSError,
    WorkerDied. What is wrong with single cases is in `faults`."""
    check_target(options)
    listed = read_case_list(options.cases) if options.cases is not None else None
    identities = Identities(options.identities)
    source = scan(options.source, nifti=options.nifti, processes=processes, progress=progress)
    if listed is None:
        drafts = draft_cases(source, options.channels, ignores_references=options.ignores_references)
    else:
        folder = options.cases.parent if options.cases is not None else options.source
        drafts = draft_listed(source, listed, folder, options.channels, ignores_references=options.ignores_references)
    faults = [*source.faults, *drafts.faults]
    notes = [*drafts.notes, *_left_out(drafts, options.table)]
    if not drafts.cases:
        raise NothingToConvert(_nothing(source, options), tuple(faults))
    try:
        table = options.table or table_of_names(
            s.name for draft in drafts.cases for label in draft.labels for s in label.structures
        )
        _check_labels(table)
        channels = options.channels or (channel_of_modality([draft.series[0].modality for draft in drafts.cases]),)
        named = identities.name(drafts.cases, options.source)
    except Rejected as error:
        raise NothingToConvert(str(error), tuple(faults)) from error
    jobs: list[CaseJob] = []
    known = frozenset(uid for series in source.series.values() for uid in series.instances)
    for case in named:
        try:
            _check_patient(case, ignores=options.ignores_references, notes=notes)
            values = chosen_values(case.draft, table, options.source, ignores_references=options.ignores_references)
        except Rejected as error:
            faults.append(Fault(case=case.name, file=None, cause=str(error)))
            continue
        absent = tuple(_absent(label, case.draft, known) for label in case.draft.labels)
        jobs.append(
            CaseJob(
                name=case.name,
                series=tuple(series.files for series in case.draft.series),
                labels=case.draft.labels,
                values=values,
                absent=tuple(frozenset() for _ in absent) if options.ignores_references else absent,
            )
        )
        notes += [
            (case.name, f"{len(found)} image(s) that its labels refer to are not in the source: slices may be missing")
            for found in absent
            if found
        ]
        notes += [(case.name, note) for note in _undescribed(values, table)]
    notes += identities.doubts(named)
    gone = tuple(identities.gone(named))
    cause = f"was converted before, and its series or labels are not in the source any more ({options.identities.name})"
    faults += [Fault(case=name, file=None, cause=cause) for name in gone]
    return Prepared(
        options=options,
        source=source,
        channels=channels,
        table=table,
        identities=identities,
        named=named,
        gone=gone,
        jobs=tuple(jobs),
        faults=tuple(faults),
        notes=tuple(notes),
    )


def convert(prepared: Prepared, *, processes: int, progress: Progress | None = None) -> ConversionReport:
    """Makes the cases that are not there yet, then dataset.json. Raises Rejected when the folder has another dataset,
    OSError when the disk is full, WorkerDied."""
    options, folder = prepared.options, prepared.options.folder
    _check_settings(prepared)
    for sub in (IMAGES, LABELS, RECORDS):
        (folder / sub).mkdir(parents=True, exist_ok=True)
        for left in (folder / sub).glob(".*"):
            left.unlink()  # of a run that was killed
    prepared.identities.write()
    kept = _kept_keys(folder)
    write_json({**_settings(prepared), "kept": kept}, folder / RECORDS / _SETTINGS)
    rules = ConversionRules(
        root=options.source,
        folder=folder,
        orientation=options.orientation,
        table=prepared.table,
        overlap=options.overlap,
        between=options.between,
        threshold=options.threshold,
    )
    expected = {**kept, **_document(prepared, [job.name for job in prepared.jobs])}
    # While cases are remade the dataset is not finished: a run that is killed leaves some by the old rules.
    if _existing(folder) != expected or not all(is_made(job, rules) for job in prepared.jobs):
        (folder / DATASET_JSON).unlink(missing_ok=True)
    results = map_cases(partial(convert_case, rules=rules), prepared.jobs, processes=processes, progress=progress)
    faults = [*prepared.faults, *(fault for result in results for fault in result.faults)]
    good = [result.name for result in results if not result.faults]
    for name in sorted({case.name for case in prepared.named} - set(good)):
        _remove(prepared, name)
    if options.skip_faulty:
        for name in prepared.gone:
            _remove(prepared, name)
    complete = bool(good) and (not faults or options.skip_faulty)
    document = {**kept, **_document(prepared, good)} if complete else None
    if document is None:
        (folder / DATASET_JSON).unlink(missing_ok=True)
    elif _existing(folder) != document:
        write_json(document, folder / DATASET_JSON)
    return ConversionReport(
        cases=tuple(good),
        made=sum(result.made for result in results),
        document=document,
        faults=tuple(faults),
        notes=(*prepared.notes, *_undrawn(prepared.table, results), *_case_notes(results)),
    )


def check_target(options: ConversionOptions) -> None:
    """Raises Rejected for a target that is no dataset's name, lies in the source, or holds what was not converted."""
    name = options.folder.resolve().name
    if not _DATASET_NAME.fullmatch(name):
        raise Rejected(f"{name[:80]!r}: nnU-Net wants a folder DatasetNNN_Name, e.g. Dataset012_Liver")
    if not options.source.is_dir():
        raise Rejected(f"{options.source}: is no folder")
    target, source = options.folder.resolve(), options.source.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise Rejected("the dataset's folder and the source lie in one another; choose a folder beside the source")
    if options.identities.resolve().is_relative_to(target):
        raise Rejected(f"{options.identities.name}: says who the patients are, and does not belong into the dataset")
    there = any((options.folder / sub).is_dir() and any((options.folder / sub).iterdir()) for sub in (IMAGES, LABELS))
    if there and not (options.folder / RECORDS / _SETTINGS).exists():
        raise Rejected(f"{name}: holds a dataset that was not converted from DICOM; choose another folder")
    if there and not options.identities.exists():
        raise Rejected(
            f"{options.identities.name} is not there, and without it nobody knows which cases {name} has; put it back, "
            "give its place with --identities, or choose another folder"
        )
    try:
        check_orientation(options.orientation)
    except ValueError as error:
        raise Rejected(str(error)) from error


def _check_labels(table: LabelTable) -> None:
    try:
        LabelManager.from_dataset_json({"labels": table.document})
    except ImportRefused as error:
        raise Rejected(str(error)) from error


def _nothing(source: Source, options: ConversionOptions) -> str:
    found = f"{len(source.series)} image series, {len(source.labels)} SEG, RTSTRUCT and NIfTI label files"
    hint = ""
    if not source.labels and "NIfTI file" in source.passed_over and options.nifti is None:
        hint = "; NIfTI files are looked at with --nifti PATTERN or a --cases file"
    return f"no case can be made: {found} were found{hint}"


def _left_out(drafts: Drafts, table: LabelTable | None) -> list[tuple[str, str]]:
    """Regions without an inside, and names that no label takes."""
    labels = [label for draft in drafts.cases for label in draft.labels]
    notes = [(f"ROI {name!r}", "left out: has no closed contour") for label in labels for name in label.left_out]
    if table is not None:
        names = {s.name for label in labels for s in label.structures}
        unused = sorted(name for name in names if not any(label.takes(name) for label in table.labels))
        notes += [(f"structure {name!r}", "left out: no label takes it") for name in unused]
    return notes


def _check_patient(case: NamedCase, *, ignores: bool, notes: list[tuple[str, str]]) -> None:
    """Raises Rejected for labels of another patient than the images. Without PatientID (anonymization empties it) the
    patient is unknown, which is told; NIfTI files never have one."""
    of_images = {series.patient_id for series in case.draft.series}
    of_labels = {label.patient_id for label in case.draft.labels if label.kind != "NIfTI"}
    known = (of_images | of_labels) - {""}
    if len(known) > 1:
        text = "PatientID (0010,0020) of labels and images differ"
        if not ignores:
            raise Rejected(f"{text}; --ignore-references takes them all the same")
        notes.append((case.name, text))
    elif known and "" in of_images | of_labels:
        without = " and ".join(what for what, ids in (("images", of_images), ("labels", of_labels)) if "" in ids)
        text = (
            "have no PatientID (0010,0020), though others of the case have: nothing says that they are of one patient"
        )
        notes.append((case.name, f"{without} {text}"))


def _absent(label: LabelObject, draft: Draft, known: frozenset[str]) -> frozenset[str]:
    own = [series.series_instance_uid for series in draft.series]
    return label.absent(own, known, frozenset(uid for series in draft.series for uid in series.instances))


def _undescribed(values: Sequence[Mapping[int, int]], table: LabelTable) -> list[str]:
    """Labels that no structure of the case is of: there they are learnt as background."""
    described = {value for of_file in values for value in of_file.values()}
    return [
        f"has no structure for {label.name!r}, which is background there"
        for value, label in enumerate(table.labels, start=1)
        if value not in described and label.name != IGNORE
    ]


def _undrawn(table: LabelTable, results: Sequence[CaseResult]) -> list[tuple[str, str]]:
    """Labels that nothing can be learnt of."""
    drawn = {value for result in results if not result.faults for value in result.values}
    return [
        (f"label {label.name!r}", "has no voxel in any case; choose labels with --label")
        for value, label in enumerate(table.labels, start=1)
        if value not in drawn and label.name != IGNORE
    ]


def _case_notes(results: Sequence[CaseResult]) -> list[tuple[str, str]]:
    return [(result.name, note) for result in results for note in result.notes]


def _document(prepared: Prepared, cases: Sequence[str]) -> dict[str, Any]:
    patients = {case.name: case.patient for case in prepared.named}
    return {
        "channel_names": {str(index): channel.name for index, channel in enumerate(prepared.channels)},
        "labels": prepared.table.document,
        "numTraining": len(cases),
        "file_ending": ENDING,
        "patients": {name: patients[name] for name in cases},
    }


def _existing(folder: Path) -> Mapping[str, Any] | None:
    try:
        return read_json(folder / DATASET_JSON, error=Rejected)
    except Rejected:
        return None


def _settings(prepared: Prepared) -> dict[str, Any]:
    names = [channel.name for channel in prepared.channels]
    return {"channels": names, "orientation": prepared.options.orientation}


def _check_settings(prepared: Prepared) -> None:
    path = prepared.options.folder / RECORDS / _SETTINGS
    if not path.exists():
        return
    before, now = read_json(path, error=Rejected), _settings(prepared)
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        raise Rejected(
            f"{changed[0]}: {before.get(changed[0])} when this folder was begun, {now[changed[0]]} now; convert into "
            "another folder"
        )


def _kept_keys(folder: Path) -> dict[str, Any]:
    """Keys that people added to dataset.json (licence, pairs, ...); they outlive a run that ends with faults."""
    settings = folder / RECORDS / _SETTINGS
    before = read_json(settings, error=Rejected).get("kept", {}) if settings.exists() else {}
    own = {"channel_names", "labels", "numTraining", "file_ending", "patients"}
    return {key: value for key, value in {**before, **(_existing(folder) or {})}.items() if key not in own}


def _remove(prepared: Prepared, name: str) -> None:
    """Files of a case that is not in the dataset (any more): nnU-Net takes what lies in imagesTr."""
    images, label = case_files(prepared.options.folder, name, len(prepared.channels))
    for path in (*images, label, record_file(prepared.options.folder, name)):
        path.unlink(missing_ok=True)
