"""What one stage of a cascade hands to the next: its label maps on the next stage's grid (nnU-Net v2).

    <results>/<dataset>/<model>/predicted_next_stage/<next configuration>/
      CASE.b2nd   uint8 (Z, Y, X), network axes, the voxels of the next stage's preprocessed case; without the package
                  blosc2 CASE.npy, which nnU-Net does not read
      CASE.json   the fold that predicted it, the digest of its labels and the size of the file; absent, or of another
                  size, where nnU-Net wrote the label map

Each case is there once, as predicted by the fold that validated it, so that the next stage learns from predictions of
networks that did not know the case. The fold `all` knows every case: what it predicts never replaces another fold's.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import DatasetInvalid
from engine.experiment import ALL
from engine.json_reader import Reader, read_json
from engine.json_writer import write_json
from engine.labels import LabelManager
from engine.logit_source import NetworkLogits
from engine.logits_to_labels import segment
from engine.plans import Configuration
from engine.preprocessed import Blosc2Array
from engine.preprocessing import CroppedImage, network_shape
from engine.sampling import StoredArray

PREDICTED_NEXT_STAGE = "predicted_next_stage"
_ARRAY, _PLAIN = ".b2nd", ".npy"
# Label maps are compressed to far less than this part of a byte a voxel.
_COMPRESSED_SHARE = 1 / 8


@dataclass(frozen=True, kw_only=True)
class NextStage:
    """Where the label maps of one fold go for one next stage. `folder` is <model>/predicted_next_stage/<next>,
    `configuration` the next stage's, `fold` the one that predicts."""

    folder: Path
    configuration: Configuration
    labels: LabelManager
    fold: str

    def lacks(self, name: str) -> bool:
        """Whether a case has no prediction that this fold's would not replace by right."""
        return _file(self.folder, name) is None or (self.fold != ALL and predicted_by(self.folder, name) == ALL)

    def write(self, name: str, output: NetworkLogits, cropped: CroppedImage) -> None:
        """The labels of the logits on the next stage's grid, as nnU-Net makes them. The fold `all` leaves what another
        fold (or nnU-Net) predicted. Raises OSError."""
        if self.fold == ALL and not self.lacks(name) and predicted_by(self.folder, name) != ALL:
            return
        shape = network_shape(cropped.shape, cropped.spacing_mm, self.configuration)
        # nnU-Net lets the grid of the logits alone decide whether an axis is resampled apart.
        labels = segment([output], shape, output.spacing_mm, self.labels).labels
        suffix, content = _encoded(np.ascontiguousarray(labels), self.configuration.patch_size)
        document = {
            "fold": self.fold,
            "sha256": hashlib.sha256(labels.tobytes()).hexdigest(),
            "bytes": len(content),
        }
        # First: a label map that is there has its description.
        write_json(document, self.folder / f"{name}.json")
        made = self.folder / f".{name}{suffix}.{os.getpid()}"
        try:
            made.write_bytes(content)
            made.replace(self.folder / f"{name}{suffix}")
        finally:
            made.unlink(missing_ok=True)
        (self.folder / f"{name}{_PLAIN if suffix == _ARRAY else _ARRAY}").unlink(missing_ok=True)

    def needed_bytes(self, name: str, voxels: int, source: Configuration) -> int:
        """An estimate of what a case will take that has so many voxels in the configuration that predicts it; 0 where
        it is there."""
        if not self.lacks(name):
            return 0
        finer = math.prod(source.spacing_mm) / math.prod(self.configuration.spacing_mm)
        return int(voxels * finer * (1 if _blosc2() is None else _COMPRESSED_SHARE))


@dataclass(frozen=True, kw_only=True)
class PreviousStage:
    """The label maps that a cascade takes from the stage before it. `digest` changes with any of those it uses."""

    folder: Path
    digest: str

    def open(self, name: str, shape: Sequence[int]) -> StoredArray:
        """A case's label map (1, Z, Y, X), read from disk where it is sliced. Raises DatasetInvalid when it is absent,
        not readable, or has another `shape` (z, y, x) than the case."""
        path = _file(self.folder, name)
        where = f"{self.folder.parent.parent.name}/{PREDICTED_NEXT_STAGE}/{self.folder.name}: {name}"
        if path is None:
            raise DatasetInvalid(f"{where}: there is no prediction of the previous stage; train its folds first")
        array = _stored(path, where)
        if tuple(array.shape) != tuple(shape):
            raise DatasetInvalid(
                f"{where}: the previous stage's prediction has {tuple(array.shape)} voxels, the case {tuple(shape)}; "
                "remove it and train the previous stage's fold again, which predicts what is missing"
            )
        return _OneChannel(array)

    def labels(self, name: str, shape: Sequence[int]) -> NDArray[np.integer[Any]]:
        """The whole label map (Z, Y, X) in memory. Raises as `open` does."""
        array: NDArray[np.integer[Any]] = np.asarray(self.open(name, shape)[(slice(None),) * 4][0])
        return array


def stage_folder(model_folder: Path, next_configuration: str) -> Path:
    return model_folder / PREDICTED_NEXT_STAGE / next_configuration


def is_predicted(folder: Path, name: str) -> bool:
    return _file(folder, name) is not None


def predicted_by(folder: Path, name: str) -> str | None:
    """The fold that predicted a case; None where that is not known (nnU-Net's own, or none). Raises DatasetInvalid for
    a damaged description."""
    described = _description(folder, name)
    return None if described is None else described.text("fold")


def stage_digest(folder: Path, names: Sequence[str]) -> str:
    """Of the label maps of these cases. Raises DatasetInvalid for a damaged description."""
    total = hashlib.sha256()
    for name in names:
        described, path = _description(folder, name), _file(folder, name)
        if described is not None:
            part = described.text("sha256")
        else:
            part = hashlib.sha256(path.read_bytes()).hexdigest() if path is not None else ""
        total.update(f"{name} {part}\n".encode())
    return total.hexdigest()[:12]


class _OneChannel:
    """A stored array (Z, Y, X) as (1, Z, Y, X)."""

    def __init__(self, array: StoredArray) -> None:
        self._array = array
        self.shape: tuple[int, ...] = (1, *array.shape)
        self.dtype: np.dtype[Any] = array.dtype

    def __getitem__(self, part: tuple[slice, ...], /) -> NDArray[Any]:
        return self._array[part[1:]][None]


def _file(folder: Path, name: str) -> Path | None:
    found = (path for path in (folder / f"{name}{_ARRAY}", folder / f"{name}{_PLAIN}") if path.exists())
    return next(found, None)


def _description(folder: Path, name: str) -> Reader | None:
    """What was written beside a label map, unless that was replaced since by somebody who writes no description."""
    path, labels = folder / f"{name}.json", _file(folder, name)
    if labels is None or not path.exists():
        return None
    described = Reader(read_json(path, error=DatasetInvalid), where=path.name, error=DatasetInvalid)
    return described if described.integer("bytes", 0, 2**62) == labels.stat().st_size else None


def _stored(path: Path, where: str) -> StoredArray:
    if path.suffix == _ARRAY and _blosc2() is None:
        return Blosc2Array(path)  # which says what is missing
    try:
        array: StoredArray = (
            Blosc2Array(path) if path.suffix == _ARRAY else np.load(path, mmap_mode="r", allow_pickle=False)
        )
    except (DatasetInvalid, OSError, ValueError, EOFError) as error:
        raise DatasetInvalid(
            f"{where}: the previous stage's prediction is not readable; remove {path.name} there and train the "
            "previous stage's fold again: a finished one predicts what is missing, and no more"
        ) from error
    return array


def _blosc2() -> Any | None:
    try:
        import blosc2
    except ImportError:
        return None
    return blosc2


def _encoded(labels: NDArray[Any], patch_size: Sequence[int]) -> tuple[str, bytes]:
    """Suffix and content of a label map's file, in chunks of about a patch."""
    blosc2 = _blosc2()
    if blosc2 is None:
        plain = io.BytesIO()
        np.save(plain, labels, allow_pickle=False)
        return _PLAIN, plain.getvalue()
    patch = (1,) * (labels.ndim - len(patch_size)) + tuple(patch_size)
    chunks = tuple(min(size, edge) for size, edge in zip(labels.shape, patch, strict=True))
    return _ARRAY, blosc2.asarray(labels, chunks=chunks).to_cframe()
