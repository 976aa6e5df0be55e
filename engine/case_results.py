"""One case of a validation: from logits to a label map, on disk, and against its reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.dataset import Case, DatasetJson, LoadedCase
from engine.errors import InputRejected
from engine.labels import LabelManager
from engine.logit_source import HalfArray, NetworkLogits
from engine.logits_to_labels import segment
from engine.metrics import CaseMetrics, evaluated_regions, measure_case
from engine.nifti import is_flat, read_label_map, read_orientation, write_nifti
from engine.plans import Configuration, Plans
from engine.preprocessing import CroppedImage, network_spacing_mm
from engine.volume import Geometry, LabelMap
from engine.whole_file import save_array, whole_file


def network_logits(logits: HalfArray, cropped: CroppedImage, configuration: Configuration) -> NetworkLogits:
    """Logits (K, Z, Y, X) of a configuration with the grid that they lie on."""
    return NetworkLogits(
        logits=logits,
        spacing_mm=network_spacing_mm(cropped.spacing_mm, configuration),
        rule=configuration.resampling_probabilities,
    )


def join_outputs(
    outputs: Sequence[NetworkLogits], cropped: CroppedImage, plans: Plans, labels: LabelManager, geometry: Geometry
) -> LabelMap:
    """The label map on the image's whole grid: of one configuration, or by the mean of the probabilities of several."""
    found = segment(outputs, cropped.shape, cropped.spacing_mm, labels).labels
    whole = np.zeros(cropped.full_shape, dtype=found.dtype)
    whole[cropped.box] = found
    return LabelMap(array=np.ascontiguousarray(whole.transpose(plans.transpose_backward)), geometry=geometry)


def write_prediction(predicted: LabelMap, case: Case, path: Path) -> None:
    """A label map in the voxel order of the case's own files, with as many axes; the whole file or none. Raises OSError
    (the disk is full)."""
    like = case.channels[0]
    write_nifti(predicted.reoriented(read_orientation(like))[0], path, flat=is_flat(like))


def has_prediction(path: Path) -> bool:
    """Whether a label map is there that can be read to its end: not what a full disk or a power failure left of one."""
    if not path.exists():
        return False
    try:
        read_label_map(path)
    except InputRejected:
        return False
    return True


def write_logits(logits: HalfArray, path: Path) -> None:
    """float16 (K, Z, Y, X); the whole file or none. Raises OSError (the disk is full)."""
    with whole_file(path) as partial, partial.open("wb") as file:
        save_array(file, logits)


def has_logits(path: Path) -> bool:
    """Whether logits are there, as long as their header says; they are not read."""
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return True


def measure_prediction(path: Path, loaded: LoadedCase, dataset_json: DatasetJson) -> CaseMetrics:
    """A label map on disk against the reference of its case. Raises InputRejected when their grids differ."""
    predicted = read_label_map(path).reoriented(dataset_json.orientation)[0]
    if predicted.geometry.shape != loaded.labels.geometry.shape:
        raise InputRejected(
            f"{loaded.name}: the prediction has {predicted.geometry.shape} voxels, the reference "
            f"{loaded.labels.geometry.shape}"
        )
    return measure_labels(loaded.labels, predicted, dataset_json.labels)


def measure_labels(reference: LabelMap, predicted: LabelMap, labels: LabelManager) -> CaseMetrics:
    """Every label or region, with surfaces."""
    return measure_case(
        reference.array,
        predicted.array,
        reference.geometry.spacing_mm,
        evaluated_regions(labels),
        ignore_label=labels.ignore_label,
    )
