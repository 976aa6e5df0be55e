"""The intensity baseline: a case of the training folder and the same case as a DICOM series have one histogram."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.dataset import Case, read_case, read_dataset_json
from engine.intensity_baseline import choose_bins, label_volumes_ml, summarize_study
from engine.volume import LabelMap, Volume
from gateway.results.series import read_series
from tests.support.phantoms import Modality, Orientation, write_series
from tests.support.raw_datasets import write_array, write_dataset

REGIONS = [(1,), (2,)]


def _write(path: Path, array: object, volume: Volume) -> None:
    geometry = volume.geometry
    write_array(
        path,
        np.asarray(array),
        geometry.spacing_mm,
        origin=geometry.origin_mm,
        direction=tuple(geometry.direction.ravel().tolist()),
    )


@pytest.mark.requirement("ART-20", open="the monitoring itself, its window and threshold")
@pytest.mark.parametrize("orientation", ["axial", "sagittal", "double-oblique"])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_training_files_and_dicom_give_the_same_summary(
    tmp_path: Path, modality: Modality, orientation: Orientation
) -> None:
    series = write_series(tmp_path / "series", modality=modality, orientation=orientation, order="shuffled")
    [part] = read_series(sorted((tmp_path / "series").iterdir()))
    live = part.volume
    assert live is not None

    # The training file holds the voxels in another order.
    stored, change = live.reoriented("RAS")
    labels = LabelMap(array=series.labels, geometry=live.geometry)
    folder = write_dataset(tmp_path / "d", cases=1)
    image, label = folder / "imagesTr" / "case_00_0000.nii.gz", folder / "labelsTr" / "case_00.nii.gz"
    _write(image, stored.array[0], stored)
    _write(label, change.apply(labels.array), stored)
    case = read_case(Case(name="case_00", channels={0: image}, label=label), read_dataset_json(folder / "dataset.json"))

    bins = choose_bins([modality], ["ct" if modality == "CT" else "zscore"], [(0.0, 1200.0)])
    trained = summarize_study(case.volume, case.labels, bins, label_volumes_ml(case.labels, REGIONS))
    found = summarize_study(live, labels, bins, label_volumes_ml(labels, REGIONS))
    assert found == trained
    foreground = found.channels[0].foreground
    assert foreground is not None
    assert max(foreground) < sum(foreground)
