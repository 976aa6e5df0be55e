"""Whether cases that no training should have seen are among training cases: by their voxels, and by their names.

Voxels are compared in one voxel order and type, so that a copy is found whatever its file's name, compression, type or
order of axes. Labels are left out: the same image with corrected labels is still the same image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from engine.dataset import Case, RawDataset
from engine.errors import DatasetInvalid, InputRejected
from engine.json_reader import read_json
from engine.json_writer import write_json
from engine.nifti import read_nifti
from engine.provenance import Provenance, cases_digest
from engine.volume import Volume

Progress = Callable[[int, int], None]

_ONE_ORDER = "LPS"
FORMAT = 1


def image_digest(channels: Iterable[Volume]) -> str:
    """SHA-256 of the float32 voxels of all channels, in the order LPS. Each volume may hold one channel or several."""
    found = hashlib.sha256()
    for volume in channels:
        turned, _ = volume.reoriented(_ONE_ORDER)
        for channel in turned.array:
            found.update(f"{channel.shape}\n".encode())
            found.update(np.ascontiguousarray(channel, dtype="<f4").data)
    return found.hexdigest()


class ImageDigests:
    """Digests of raw cases, kept in a file so that each image is read once: it is read again when the path, size or
    time of one of its files changes. Without a file nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        self._asked: set[str] = set()
        if path is not None:
            try:
                document = read_json(path, error=DatasetInvalid)
            except DatasetInvalid:
                document = {}  # absent, or cut short by a power failure: made again
            stored = document.get("images")
            if document.get("format") == FORMAT and isinstance(stored, dict):
                self._known = {key: value for key, value in stored.items() if isinstance(value, str)}

    def of(self, case: Case) -> str:
        """Raises InputRejected, with the case, for a file that is missing or cannot be read."""
        key = _stamp(case)
        self._asked.add(key)
        if key not in self._known:
            try:
                self._known[key] = image_digest(read_nifti([path]) for path in case.channels.values())
            except InputRejected as error:
                raise InputRejected(f"{case.name}: {error}") from error
        return self._known[key]

    def save(self, *, whole: bool) -> None:
        """`whole`: everything was asked for, and the rest is of files that are gone or changed. Raises OSError."""
        if self._path is not None and self._asked:
            kept = {key: value for key, value in self._known.items() if not whole or key in self._asked}
            write_json({"format": FORMAT, "images": kept}, self._path)


def copies(
    images: Mapping[str, str],
    datasets: Sequence[RawDataset],
    digests: ImageDigests,
    *,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Which of `images` (digest by case) are images of the datasets, excluded cases included: dataset by case.

    Raises InputRejected for a case that is trained on and cannot be read: nothing is known of it then.
    """
    wanted: dict[str, list[str]] = {}
    for name, digest in images.items():
        wanted.setdefault(digest, []).append(name)
    found: dict[str, str] = {}
    total, done, whole = sum(len(dataset.cases) + len(dataset.excluded) for dataset in datasets), 0, False
    try:
        for dataset in datasets:
            for case in (*dataset.cases, *dataset.excluded):
                try:
                    digest = digests.of(case)
                except InputRejected:
                    if case in dataset.cases:
                        raise
                    digest = ""  # excluded, as a rule because it cannot be read
                for name in wanted.get(digest, ()):
                    found.setdefault(name, dataset.name)
                done += 1
                if progress is not None:
                    progress(done, total)
        whole = True
    finally:
        digests.save(whole=whole)
    return found


def named_as_learnt(
    names: Iterable[str], learnt: frozenset[str], datasets: Sequence[RawDataset], provenance: Provenance | None
) -> frozenset[str]:
    """Names that a training knows (`learnt`) of cases that its datasets no longer have: moved away since. What is in a
    dataset still was compared by its voxels, and another case may have the same name.

    A bundle knows its cases by digests of lists of names. A digest of exactly these names, or of these and those of a
    dataset, says that they were learnt from.
    """
    present = [frozenset(case.name for case in (*dataset.cases, *dataset.excluded)) for dataset in datasets]
    asked = frozenset(names).difference(*present)
    if provenance is not None and asked:
        said = {provenance.data.cases_digest, *(fold.training_cases_digest for fold in provenance.training)}
        if said & {cases_digest(asked), *(cases_digest(asked | own) for own in present)}:
            return asked
    return asked & learnt


def _stamp(case: Case) -> str:
    files = []
    for path in case.channels.values():
        try:
            state = path.stat()
        except OSError as error:
            raise InputRejected(f"{case.name}: {path.name}: cannot be read: {error.strerror}") from error
        files.append([str(path.resolve()), state.st_size, state.st_mtime_ns])
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
