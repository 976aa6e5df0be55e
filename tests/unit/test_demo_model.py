"""The demo model's card against the data that the model was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from engine.bundle import load_bundle
from gateway.demo.make_model import MODEL

pytestmark = pytest.mark.peer("shared-data")


def test_orientation_is_that_of_every_training_image(shared_data: Path) -> None:
    files = sorted((shared_data / "Dataset004_Hippocampus" / "imagesTr").glob("*.nii.gz"))
    assert len(files) == 200
    reader = sitk.ImageFileReader()
    for file in files:
        reader.SetFileName(str(file))
        reader.ReadImageInformation()
        # ITK's directions are towards left, back and head (LPS): columns are the index axes x, y, z.
        direction = np.reshape(reader.GetDirection(), (3, 3))
        assert np.allclose(direction, np.diag([-1.0, -1.0, 1.0])), file.name
    assert load_bundle(MODEL).contract.orientation == "RAS"


def test_volume_ranges_are_the_population_widened_by_a_quarter(shared_data: Path) -> None:
    volumes_ml: dict[int, list[float]] = {1: [], 2: []}
    for file in sorted((shared_data / "Dataset004_Hippocampus" / "labelsTr").glob("*.nii.gz")):
        image = sitk.ReadImage(str(file))
        labels = sitk.GetArrayFromImage(image)
        for value, found in volumes_ml.items():
            found.append(float((labels == value).sum() * np.prod(image.GetSpacing()) / 1000.0))
    for label in load_bundle(MODEL).labels:
        low, high = np.percentile(volumes_ml[label.value], [0.5, 99.5])
        assert label.volume_range_ml == pytest.approx((0.75 * low, 1.25 * high), abs=0.006)
