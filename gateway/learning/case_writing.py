"""Results with right labels → a raw dataset of nnU-Net to be learnt from.

    DatasetNNN_Name/
      imagesTr/live_RESULT_0000.nii.gz    labelsTr/live_RESULT.nii.gz
      cases.json       what each case was made from, and the digests of its files
      dataset.json     the model's own, with these cases; written last
    DatasetNNN_Name.salt                  beside it, for its owner alone

Images are read as inference reads them and written in the voxel order that the model was trained in; nothing is
resampled. Names are those of results. `patients` keeps a person's cases together under a salted digest: the salt lies
outside, so that nobody who is given the dataset can try identifiers.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.dataset import DATASET_JSON, IMAGES, LABELS, DatasetJson, undeclared_labels
from engine.dataset_lock import changing_dataset
from engine.errors import EngineError
from engine.json_reader import Reader, read_json
from engine.json_writer import write_json
from engine.nifti import write_image
from engine.parallel import Progress
from engine.volume import LabelMap
from engine.whole_file import whole_file
from gateway.errors import Rejected
from gateway.learning.case_choice import patient_of
from gateway.learning.corrections import USABLE, correction_of, right_labels
from gateway.learning.result_source import ResultSource, image_of, result_source
from gateway.training_data.case_conversion import DISK_FULL
from storage.database import Database
from storage.durable_files import file_digest
from storage.errors import ObjectChanged, ObjectMissing
from storage.learning_records import Correction
from storage.records import Result
from storage.spool import Spool

MANIFEST = "cases.json"
FORMAT = 1
"""Raised when the same result makes another case: then all are made again."""
_PREFIX = "live_"
_OWN_KEYS = frozenset({"dataset", "patients", "numTraining"})
_MOST_FILES = 1024


@dataclass(frozen=True, kw_only=True)
class WrittenCases:
    """`names`: result → case of those that are in the dataset, `made` of them were written now. `corrections`: result →
    the row of what was said of it, by which the labels were chosen. `left_out`: result → why it is not there."""

    names: Mapping[str, str]
    made: int
    corrections: Mapping[str, int]
    left_out: Mapping[str, str]


def write_cases(
    database: Database,
    spool: Spool,
    result_ids: Sequence[str],
    target: Path,
    *,
    dataset_json: DatasetJson,
    orientation: str,
    progress: Progress | None = None,
) -> WrittenCases:
    """The dataset `target` with exactly these results, each with the labels that a reader approved or gave.

    `dataset_json` is that of the model's own dataset, `orientation` the voxel order of its bundle's contract. Started
    again, only what is missing or changed is made. A result that cannot be a case is left out, with the reason.

    Raises Rejected when none can be, or the folder has another dataset; DatasetBusy; OSError when the disk is full;
    DatabaseAway.
    """
    if len(dataset_json.channel_names) != 1:
        raise Rejected(f"the model takes {len(dataset_json.channel_names)} channels; a result's series gives one")
    with changing_dataset(target):
        return _Writing(database, spool, target, dataset_json, orientation).run(
            list(dict.fromkeys(result_ids)), progress
        )


def case_name(result_id: str) -> str:
    return f"{_PREFIX}{result_id}"


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A result that has right labels. `stamp`: a digest of all that its files depend on."""

    source: ResultSource
    correction: Correction
    stamp: str

    @property
    def name(self) -> str:
        return case_name(self.source.result.result_id)


class _Writing:
    """One run of `write_cases`, which holds the dataset."""

    def __init__(
        self, database: Database, spool: Spool, target: Path, dataset_json: DatasetJson, orientation: str
    ) -> None:
        self._database, self._spool, self._target = database, spool, target
        self._dataset, self._orientation = dataset_json, orientation
        self._entries = self._manifest()
        self._left_out: dict[str, str] = {}

    def run(self, result_ids: Sequence[str], progress: Progress | None) -> WrittenCases:
        for folder in (IMAGES, LABELS):
            (self._target / folder).mkdir(parents=True, exist_ok=True)
            for left in (self._target / folder).glob(".*"):
                left.unlink()  # of a run that was killed
        cases = {result_id: case for result_id in result_ids if (case := self._case(result_id)) is not None}
        for result_id in sorted(set(self._entries) - set(cases)):
            self._remove(result_id)
        made = 0
        for done, (result_id, case) in enumerate(cases.items()):
            if progress is not None:
                progress(done, len(cases))
            if self._is_made(result_id, case):
                continue
            # While a case is missing the dataset is not finished.
            (self._target / DATASET_JSON).unlink(missing_ok=True)
            self._remove(result_id)
            if self._make(result_id, case):
                made += 1
        there = {result_id: case for result_id, case in cases.items() if result_id in self._entries}
        if progress is not None:
            progress(len(cases), len(cases))
        if not there:
            first = next(iter(self._left_out.values()), "no result was given")
            raise Rejected(f"no case to learn from can be written: {first}")
        self._finish(list(there.values()))
        return WrittenCases(
            names={result_id: case.name for result_id, case in there.items()},
            made=made,
            corrections={result_id: case.correction.correction_id for result_id, case in there.items()},
            left_out=dict(self._left_out),
        )

    def _case(self, result_id: str) -> _Case | None:
        try:
            with self._database.reading() as session:
                if session.get(Result, result_id) is None:
                    raise Rejected(f"there is no result {result_id}")
                correction = correction_of(session, result_id)
            if correction is None or correction.kind not in USABLE:
                raise Rejected(f"result {result_id}: nobody said which labels are right")
            source = result_source(self._database, self._spool, result_id)
        except (Rejected, ObjectMissing) as error:
            self._left_out[result_id] = str(error)
            return None
        runtime = source.result.runtime or {}
        labels = correction.labels_digest or runtime.get("labels", {}).get("sha256")
        depends_on = (FORMAT, self._orientation, self._dataset.file_ending, source.result.part, source.digests, labels)
        return _Case(source=source, correction=correction, stamp=_digest(depends_on))

    def _files(self, name: str) -> tuple[str, str]:
        """Of image and labels, below the dataset."""
        ending = self._dataset.file_ending
        return f"{IMAGES}/{name}_0000{ending}", f"{LABELS}/{name}{ending}"

    def _is_made(self, result_id: str, case: _Case) -> bool:
        entry = self._entries.get(result_id)
        if entry is None or entry["source"] != case.stamp or set(entry["files"]) != set(self._files(case.name)):
            return False
        try:
            return all(file_digest(self._target / file) == digest for file, digest in entry["files"].items())
        except FileNotFoundError:
            return False

    def _make(self, result_id: str, case: _Case) -> bool:
        """False where the case was left out."""
        image_file, label_file = self._files(case.name)
        try:
            labels = right_labels(self._spool, case.source.result, case.correction)
            image, change = image_of(case.source, self._orientation)
            if labels.shape != change.source.shape:
                raise Rejected(f"result {result_id}: labels {labels.shape}, images {change.source.shape} (z, y, x)")
            turned = LabelMap(array=change.apply(labels), geometry=change.target)
            if unexpected := undeclared_labels(turned, self._dataset.labels):
                raise Rejected(f"result {result_id}: {unexpected} in the model's {DATASET_JSON}")
            write_image(image, change.target, self._target / image_file)
            write_image(turned.array, change.target, self._target / label_file)
        except (Rejected, EngineError, ObjectMissing, ObjectChanged, OSError) as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            self._left_out[result_id] = str(error)
            self._remove(result_id)
            return False
        files = {file: file_digest(self._target / file) for file in (image_file, label_file)}
        self._entries[result_id] = {"case": case.name, "source": case.stamp, "files": files}
        self._write_manifest()
        return True

    def _remove(self, result_id: str) -> None:
        """Files of a case that is not in the dataset (any more): nnU-Net takes what lies in imagesTr."""
        if result_id in self._entries:
            (self._target / DATASET_JSON).unlink(missing_ok=True)
            del self._entries[result_id]
            self._write_manifest()
        for file in self._files(case_name(result_id)):
            (self._target / file).unlink(missing_ok=True)

    def _finish(self, cases: Sequence[_Case]) -> None:
        salt = self._salt()
        patients = {
            case.name: "patient_" + hmac.new(salt, patient_of(case.source.study).encode(), "sha256").hexdigest()[:16]
            for case in cases
        }
        kept = {key: value for key, value in self._dataset.document.items() if key not in _OWN_KEYS}
        document = {**kept, "numTraining": len(cases), "patients": dict(sorted(patients.items()))}
        with suppress(Rejected):
            if read_json(self._target / DATASET_JSON, error=Rejected) == document:
                return
        write_json(document, self._target / DATASET_JSON)

    def _salt(self) -> bytes:
        """Made once for a dataset; without it the same people have new pseudonyms."""
        path = self._target.with_name(f"{self._target.name}.salt")
        if not path.exists():
            with whole_file(path) as made:
                made.touch(mode=0o600)
                made.write_bytes(secrets.token_bytes(32))
        return path.read_bytes()

    def _manifest(self) -> dict[str, dict[str, Any]]:
        """Entries by result. Raises Rejected for a folder with cases that were not written here."""
        path = self._target / MANIFEST
        if not path.exists():
            there = any(
                (self._target / sub).is_dir() and any((self._target / sub).iterdir()) for sub in (IMAGES, LABELS)
            )
            if there or (self._target / DATASET_JSON).exists():
                raise Rejected(f"{self._target.name}: holds another dataset; choose another folder")
            self._entries = {}
            self._write_manifest()
            return {}
        document = Reader(read_json(path, error=Rejected), where=path.name, error=Rejected)
        if document.integer("format", 0, 10**6) != FORMAT:
            return {}
        cases = document.child("cases")
        found: dict[str, dict[str, Any]] = {}
        for result_id in cases.keys():  # noqa: SIM118 - Reader is no mapping; keys() checks each key
            entry = cases.child(result_id)
            files = entry.child("files")
            found[result_id] = {
                "case": entry.text("case"),
                "source": entry.text("source"),
                "files": {file: files.text(file) for file in files.keys()},  # noqa: SIM118
            }
        return found

    def _write_manifest(self) -> None:
        write_json({"format": FORMAT, "cases": self._entries}, self._target / MANIFEST, sort_keys=True)


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
