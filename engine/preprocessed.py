"""Preprocessed training cases on disk: what the network is trained on, one folder per configuration.

    <preprocessed>/<dataset>/<data_identifier>/
      CASE.npy            float32 (C, Z, Y, X), network axes and spacing, normalised
      CASE_seg.npy        int16 (Z, Y, X); -1 = background outside the nonzero region
      CASE_locations.npz  per class or region ("1", "1,2") sampled voxels int32 (n, 4), as rows (0, z, y, x)
      CASE.json           written last: shapes, spacing, box, the stamp of what the case was made from, and the digest
                          of image and label map

Arrays are mapped into memory, so that a patch costs the pages it lies on. A case whose stamp is right is not made
again. Names and rules are nnU-Net v2's.

nnU-Net's own folders (CASE.b2nd, CASE_seg.b2nd) are read too, with the package blosc2. Its CASE.pkl are never opened,
since a pickle runs what it holds: the locations are taken from the label map, anew whenever a case is opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from engine.data_digest import CONTENT, STAMP, content_digest
from engine.dataset import DATASET_JSON, Case, DatasetJson, read_case
from engine.errors import DatasetInvalid, InputRejected
from engine.json_reader import Reader, read_json
from engine.json_writer import write_json
from engine.labels import LabelManager
from engine.parallel import Progress, map_cases
from engine.plans import Configuration, Plans
from engine.preprocessing import crop_to_nonzero, network_spacing_mm, preprocess_labelled
from engine.sampling import ClassKey, ClassLocations, StoredArray
from engine.whole_file import save_array, whole_file

FORMAT = 1
_SAMPLES_PER_CLASS = 10_000
_LEAST_SHARE = 0.01
_LOCATION_SEED = 1234
_MOST = int(np.iinfo(np.int16).max)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreprocessedCase:
    """One case, its arrays on disk: float32, and int16 with one channel. `locations`: see engine/sampling.py.
    `previous_1ZYX` (cascade): the previous stage's label map (engine/stage_predictions.py)."""

    name: str
    image_CZYX: StoredArray
    labels_1ZYX: StoredArray
    locations: ClassLocations
    previous_1ZYX: StoredArray | None = None


class Blosc2Array:
    """An array of nnU-Net's on disk. One thread at a time reads: a decompressor is shared by none.

    Raises DatasetInvalid when it is not readable, or the package blosc2 is missing.
    """

    def __init__(self, path: Path) -> None:
        try:
            import blosc2
        except ImportError as error:
            raise DatasetInvalid(
                f"{path.name}: nnU-Net's arrays need the Python package blosc2; install it, or preprocess the dataset "
                "here"
            ) from error
        try:
            self._array: Any = blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
            self.shape: tuple[int, ...] = tuple(self._array.shape)
            self.dtype: np.dtype[Any] = self._array.dtype
        except (OSError, RuntimeError, ValueError, AttributeError) as error:
            # blosc2's own words name the whole path.
            raise DatasetInvalid(f"{path.name}: not readable as a Blosc2 array") from error
        self._lock = Lock()

    def __getitem__(self, part: tuple[slice, ...], /) -> NDArray[Any]:
        with self._lock:
            read: NDArray[Any] = self._array[part]
        return read


@dataclass(frozen=True, kw_only=True)
class PreprocessJob:
    """What a worker needs to make every configuration of a case."""

    plans: Plans
    configurations: tuple[Configuration, ...]
    dataset_json: DatasetJson
    folders: Mapping[str, Path]


def preprocess_dataset(
    job: PreprocessJob, cases: Sequence[Case], *, processes: int, progress: Progress | None = None
) -> int:
    """Makes every case that is not there yet; returns how many were made.

    Raises InputRejected or DatasetInvalid with the case's name, OSError when the disk is full, WorkerDied.
    """
    if job.dataset_json.labels.highest_value > _MOST:
        raise DatasetInvalid(
            f"{DATASET_JSON}: labels up to {job.dataset_json.labels.highest_value}; preprocessed cases hold {_MOST} at "
            "most, as nnU-Net's do"
        )
    for folder in job.folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    # A read-only view cannot travel to another process.
    intensities = dict(job.plans.foreground_intensity_properties)
    plans = replace(job.plans, configurations={}, foreground_intensity_properties=intensities)
    make = partial(_make_case, replace(job, plans=plans))
    return sum(map_cases(make, cases, processes=processes, progress=progress))


def open_case(folder: Path, name: str, manager: LabelManager) -> PreprocessedCase:
    """A case of ours or of nnU-Net's. Raises DatasetInvalid with the file that is absent or not what it should be."""
    nnunet = folder / f"{name}.b2nd"
    case = _open_nnunet_case(folder, name, manager) if nnunet.exists() else _open_own_case(folder, name)
    image, labels = case.image_CZYX.shape, case.labels_1ZYX.shape
    if len(image) != 4 or labels != (1, *image[1:]):
        raise DatasetInvalid(f"{folder.name}/{name}: image {image} and labels {labels} do not fit")
    return case


def _open_own_case(folder: Path, name: str) -> PreprocessedCase:
    document = Reader(
        read_json(folder / f"{name}.json", error=DatasetInvalid), where=f"{name}.json", error=DatasetInvalid
    )
    if document.integer("format", 0, 2**16) != FORMAT:
        raise document.fail("format", f"is not {FORMAT}: preprocess the dataset again")
    try:
        image = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / f"{name}_seg.npy", mmap_mode="r", allow_pickle=False)
        with np.load(folder / f"{name}_locations.npz", allow_pickle=False) as stored:
            locations = {_class_key(key): stored[key] for key in stored}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DatasetInvalid(f"{folder.name}/{name}: not readable ({error}); preprocess the dataset again") from error
    return PreprocessedCase(name=name, image_CZYX=image, labels_1ZYX=labels[None], locations=locations)


def _open_nnunet_case(folder: Path, name: str, manager: LabelManager) -> PreprocessedCase:
    labels = Blosc2Array(folder / f"{name}_seg.b2nd")
    return PreprocessedCase(
        name=name,
        image_CZYX=Blosc2Array(folder / f"{name}.b2nd"),
        labels_1ZYX=labels,
        locations=locate(labels[:, :, :, :][0], manager),
    )


def case_names(folder: Path) -> tuple[str, ...]:
    """Cases that are complete, sorted: ours, or else nnU-Net's."""
    ours = {path.name.removesuffix(".json") for path in folder.glob("*.json")}
    nnunet = {path.name.removesuffix(".b2nd") for path in folder.glob("*.b2nd") if not path.stem.endswith("_seg")}
    return tuple(sorted(ours or nnunet))


def locate(labels_ZYX: NDArray[np.integer[Any]], manager: LabelManager) -> dict[ClassKey, NDArray[np.int32]]:
    """Sampled voxels per label or region and, with an ignore label, of everything annotated (engine/sampling.py).

    Of n voxels of a class at most 10,000 are kept, or 1 % where that is more, without replacement and from a fixed
    seed (nnU-Net's rule).
    """
    random = np.random.RandomState(_LOCATION_SEED)
    flat = labels_ZYX.reshape(-1)

    def sample(is_of_class: NDArray[np.bool_]) -> NDArray[np.int32]:
        count = int(np.count_nonzero(is_of_class))
        wanted = max(min(_SAMPLES_PER_CLASS, count), int(np.ceil(count * _LEAST_SHARE)))
        # Drawn before the voxels are listed: each of the two takes 8 bytes a voxel of the class for a moment.
        chosen = random.choice(count, wanted, replace=False).copy() if wanted < count else slice(None)
        found = np.flatnonzero(is_of_class)[chosen]
        return np.stack(np.unravel_index(found, (1, *labels_ZYX.shape)), axis=1).astype(np.int32)

    located: dict[ClassKey, NDArray[np.int32]] = {
        label.region if manager.has_regions else label.value: sample(_is_any_of(flat, label.region))
        for label in manager.foreground
    }
    if manager.ignore_label is not None:
        located[-1, *manager.values] = sample(flat != manager.ignore_label)
    return located


def _is_any_of(values: NDArray[np.integer[Any]], wanted: Sequence[int]) -> NDArray[np.bool_]:
    """`np.isin` for few values, in the time of a comparison each."""
    found: NDArray[np.bool_] = values == wanted[0]
    for value in wanted[1:]:
        found |= values == value
    return found


def _class_key(text: str) -> ClassKey:
    values = tuple(int(value) for value in text.split(","))
    return values if len(values) > 1 else values[0]


def _make_case(job: PreprocessJob, case: Case) -> int:
    """1 where anything was made, 0 where all was there."""
    missing = [c for c in job.configurations if not _is_made(job, c, case)]
    if not missing:
        return 0
    loaded = read_case(case, job.dataset_json)
    try:
        cropped = crop_to_nonzero(loaded.volume, job.plans)
    except InputRejected as error:
        raise InputRejected(f"{case.name}: {error}") from error
    spacing_mm = cropped.spacing_mm
    shapes = {
        "shape_before_cropping": list(cropped.full_shape),
        "bbox_used_for_cropping": [[part.start, part.stop] for part in cropped.box],
        "shape_after_cropping_and_before_resampling": list(cropped.shape),
    }
    whole = loaded.labels.array.transpose(job.plans.transpose_forward)
    made = preprocess_labelled(cropped, job.plans, missing, whole)
    del loaded, cropped, whole  # `made` has them, and lets go of what it no longer needs
    for configuration, image, labels in made:
        locations = locate(labels, job.dataset_json.labels)
        folder = job.folders[configuration.name]
        stored = {",".join(map(str, key if isinstance(key, tuple) else (key,))): v for key, v in locations.items()}
        _write(folder / f"{case.name}.npy", partial(save_array, array=image))
        _write(folder / f"{case.name}_seg.npy", partial(save_array, array=labels))
        _write(folder / f"{case.name}_locations.npz", partial(_save_all, arrays=stored))
        document = {
            "format": FORMAT,
            STAMP: _stamp(job, configuration, case),
            CONTENT: content_digest(image, labels),
            **shapes,
            "shape": list(image.shape),
            "spacing": list(network_spacing_mm(spacing_mm, configuration)),
        }
        write_json(document, folder / f"{case.name}.json")
        del image, labels
    return 1


def _is_made(job: PreprocessJob, configuration: Configuration, case: Case) -> bool:
    """Its arrays are opened too: after a power failure a file can be empty whose name is there."""
    folder = job.folders[configuration.name]
    try:
        stamp = read_json(folder / f"{case.name}.json", error=DatasetInvalid).get(STAMP)
        return stamp == _stamp(job, configuration, case) and bool(_open_own_case(folder, case.name))
    except DatasetInvalid:
        return False


def _stamp(job: PreprocessJob, configuration: Configuration, case: Case) -> str:
    """Changes with the files of the case and with everything that decides how its arrays are made."""
    files = []
    for path in (*case.channels.values(), case.label):
        state = path.stat() if path.exists() else None
        files.append([path.name, state.st_size, state.st_mtime_ns] if state else [path.name])
    rules = {
        "files": files,
        "transpose_forward": job.plans.transpose_forward,
        "spacing": configuration.spacing_mm,
        "normalization": configuration.normalization_schemes,
        "masked": configuration.use_mask_for_norm,
        "intensities": {str(index): vars(found) for index, found in job.plans.foreground_intensity_properties.items()},
        "resampling": [vars(configuration.resampling_data), vars(configuration.resampling_seg)],
        "labels": job.dataset_json.document["labels"],
        "orientation": job.dataset_json.orientation,
        "format": FORMAT,
    }
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def _save_all(file: BinaryIO, arrays: Mapping[str, NDArray[Any]]) -> None:
    np.savez(file, allow_pickle=False, **arrays)


def _write(path: Path, save: Any) -> None:
    """The whole file or none: a worker that is ended leaves nothing that looks complete."""
    with whole_file(path) as made, made.open("wb") as file:
        save(file)
