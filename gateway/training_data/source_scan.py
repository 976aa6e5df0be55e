"""A folder with DICOM files under any names → the image series and label objects in it, by their UIDs.

Only headers are read. A file that is neither DICOM nor a NIfTI file that was asked for is passed over; a DICOM file
that cannot be read is a fault and stops nothing else.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.uid import UID

from engine.parallel import Progress, map_cases
from gateway.results import attributes
from gateway.results.attributes import READ_ERRORS, Where
from gateway.results.frames import read_header
from gateway.training_data.faults import FAULT_ERRORS, Fault
from gateway.training_data.label_objects import LABEL_CLASSES, LabelObject, read_label_object

_BATCH = 64
_KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Modality",
    "SeriesDescription",
    "PatientID",
    "PatientName",
    "IssuerOfPatientID",
    "Rows",
    "ImagePositionPatient",
    "SharedFunctionalGroupsSequence",
)
# Planes with a place in the patient that no network is trained on.
_NO_IMAGES = ("RT ", "Parametric Map", "Surface Segmentation")


@dataclass(frozen=True, kw_only=True)
class SourceSeries:
    """One series: its files sorted, and what its first image says. `instances` are its SOP Instance UIDs."""

    study_instance_uid: str
    series_instance_uid: str
    frames_of_reference: frozenset[str]
    modality: str
    description: str
    patient_id: str
    issuer: str
    patient_name: str
    files: tuple[Path, ...]
    instances: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What `scan` found. `passed_over` counts files that are nothing of use, by kind."""

    root: Path
    series: Mapping[str, SourceSeries]
    labels: tuple[LabelObject, ...]
    faults: tuple[Fault, ...]
    passed_over: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class _Image:
    file: Path
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    frame_of_reference_uid: str
    modality: str
    description: str
    patient_id: str
    issuer: str
    patient_name: str


_Seen = _Image | LabelObject | Fault | str
"""A string names the kind of a file that is passed over."""


def scan(root: Path, *, nifti: str | None, processes: int, progress: Progress | None = None) -> Source:
    """Look at every file below `root`. nifti: pattern (fnmatch) of names of NIfTI label maps, None for none.

    Raises OSError when a folder cannot be listed, WorkerDied.
    """
    files, links = _files(root)
    return scan_files(files, root=root, nifti=nifti, processes=processes, progress=progress, links=links)


def scan_files(
    files: Sequence[Path],
    *,
    root: Path,
    nifti: str | None = None,
    processes: int = 1,
    progress: Progress | None = None,
    links: int = 0,
) -> Source:
    """The same for given files; `links` are links to folders that were passed over. Raises WorkerDied."""
    batches = [files[start : start + _BATCH] for start in range(0, len(files), _BATCH)]
    look = partial(_look, root=root, nifti=nifti)
    seen = [found for batch in map_cases(look, batches, processes=processes, progress=progress) for found in batch]
    images: dict[str, list[_Image]] = {}
    for image in seen:
        if isinstance(image, _Image):
            images.setdefault(image.series_instance_uid, []).append(image)
    mixed = {uid for uid, found in images.items() if len({(i.patient_id, i.study_instance_uid) for i in found}) > 1}
    cause = "holds images of several patients or studies (PatientID or StudyInstanceUID differ)"
    return Source(
        root=root,
        series={uid: _series(images[uid]) for uid in sorted(images) if uid not in mixed},
        labels=tuple(found for found in seen if isinstance(found, LabelObject)),
        faults=(
            *(found for found in seen if isinstance(found, Fault)),
            *(Fault(case=None, file=f"series {uid}", cause=cause) for uid in sorted(mixed)),
        ),
        passed_over=dict(
            sorted(
                Counter([*(found for found in seen if isinstance(found, str)), *["link to a folder"] * links]).items()
            )
        ),
    )


def shown(file: Path, root: Path) -> str:
    """The path below the source, for messages."""
    return str(file.relative_to(root)) if file.is_relative_to(root) else file.name


def _files(root: Path) -> tuple[list[Path], int]:
    """And how many links to folders there are, which are not followed: they may lead in circles."""

    def unreadable(error: OSError) -> None:
        raise error

    found, links = [], 0
    for folder, folders, names in os.walk(root, onerror=unreadable):
        links += sum(Path(folder, name).is_symlink() for name in folders)
        # Names with a leading dot are what systems leave beside the files that they copy.
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found), links


def _series(images: Sequence[_Image]) -> SourceSeries:
    first = images[0]
    return SourceSeries(
        study_instance_uid=first.study_instance_uid,
        series_instance_uid=first.series_instance_uid,
        frames_of_reference=frozenset(i.frame_of_reference_uid for i in images if i.frame_of_reference_uid),
        modality=first.modality,
        description=first.description,
        patient_id=first.patient_id,
        issuer=first.issuer,
        patient_name=first.patient_name,
        files=tuple(image.file for image in images),
        instances=frozenset(image.sop_instance_uid for image in images),
    )


def _look(files: Sequence[Path], *, root: Path, nifti: str | None) -> list[_Seen]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's name values of the file
        return [_look_at(file, root, nifti) for file in files]


def _look_at(file: Path, root: Path, nifti: str | None) -> _Seen:
    try:
        if not file.is_file():
            return "no plain file"
        if file.name.endswith((".nii", ".nii.gz")):
            return read_label_object(file) if nifti and fnmatch(file.name, nifti) else "NIfTI file"
        with file.open("rb") as stream:
            if stream.read(132)[128:] != b"DICM":
                return "no DICOM file (no preamble)"
        return _look_at_dicom(file)
    except FAULT_ERRORS as error:
        return Fault(case=None, file=shown(file, root), cause=str(error) or type(error).__name__)


def _look_at_dicom(file: Path) -> _Seen:
    where = Where(file=file)
    header = read_header(file, where, only=_KEYWORDS)
    sop_class_uid = attributes.uid(header, "SOPClassUID", where)
    if sop_class_uid in LABEL_CLASSES:
        return read_label_object(file)
    name = UID(sop_class_uid).name or "DICOM file without SOPClassUID"
    placed = "ImagePositionPatient" in header or "SharedFunctionalGroupsSequence" in header
    if not placed or "Rows" not in header or name.startswith(_NO_IMAGES) or "Secondary Capture" in name:
        return name
    return _Image(
        file=file,
        sop_instance_uid=attributes.required_uid(header, "SOPInstanceUID", where),
        study_instance_uid=attributes.required_uid(header, "StudyInstanceUID", where),
        series_instance_uid=attributes.required_uid(header, "SeriesInstanceUID", where),
        frame_of_reference_uid=attributes.uid(header, "FrameOfReferenceUID", where),
        modality=attributes.text(header, "Modality", where),
        description=attributes.text(header, "SeriesDescription", where),
        patient_id=attributes.text(header, "PatientID", where),
        issuer=attributes.text(header, "IssuerOfPatientID", where),
        patient_name=_person_name(header),
    )


def _person_name(header: Dataset) -> str:
    """By the object's character set; one that cannot be decoded is no reason to refuse the image."""
    try:
        return str(header.get("PatientName") or "")
    except READ_ERRORS:
        return ""
