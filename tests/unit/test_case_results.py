"""engine.case_results: predictions and logits on disk, whole or as good as not there."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from engine.case_results import has_logits, has_prediction, write_logits, write_prediction
from engine.dataset import Case
from engine.nifti import read_label_map, read_nifti
from engine.volume import Geometry, LabelMap
from tests.support.raw_datasets import write_array

SHAPE = (20, 32, 32)


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """Files of this process end there, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _labels() -> LabelMap:
    array = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)
    return LabelMap(array=array, geometry=Geometry(shape=SHAPE, affine_lps=np.eye(4)))


def _case(folder: Path, ending: str = ".nii.gz") -> Case:
    source = write_array(folder / f"source{ending}", np.ones(SHAPE, np.uint8), (1.0, 1.0, 1.0))
    return Case(name="a", channels={0: source}, label=source)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd", ".gipl"])
def test_on_a_full_disk_the_prediction_is_an_error_and_the_old_one_stays(tmp_path: Path, ending: str) -> None:
    case, folder = _case(tmp_path, ending), tmp_path / "validation"
    folder.mkdir()
    path = folder / f"a{ending}"
    for there in ([], [path]):
        with disk_with_room_for(2048), pytest.raises(OSError, match="is the disk full"):
            write_prediction(_labels(), case, path)
        assert list(folder.iterdir()) == there
        if not there:
            write_prediction(_labels(), case, path)
    assert np.array_equal(read_label_map(path).array, _labels().array)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd", ".gipl"])
def test_a_prediction_that_was_cut_short_is_as_good_as_none(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    assert not has_prediction(path)
    write_prediction(_labels(), _case(tmp_path, ending), path)
    assert has_prediction(path)
    size = path.stat().st_size
    for left in (size // 2, 10, 0):
        os.truncate(path, left)
        assert not has_prediction(path)


def test_logits_that_were_cut_short_are_as_good_as_none(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    assert not has_logits(path)
    with disk_with_room_for(2048), pytest.raises(OSError, match="is the disk full"):
        write_logits(np.zeros((3, *SHAPE), np.float16), path)
    assert list(tmp_path.iterdir()) == []
    write_logits(np.zeros((3, *SHAPE), np.float16), path)
    assert has_logits(path)
    for left in (path.stat().st_size - 1, 10, 0):
        os.truncate(path, left)
        assert not has_logits(path)


def test_the_prediction_of_an_image_with_two_axes_has_two(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.ones((30, 40), np.float32))
    image.SetSpacing((0.25, 1.0))
    image.SetOrigin((3.0, -4.0))
    sitk.WriteImage(image, str(tmp_path / "image.nii.gz"))
    geometry = read_nifti([tmp_path / "image.nii.gz"]).geometry
    array = np.random.default_rng(0).integers(0, 3, (1, 30, 40)).astype(np.uint8)
    case = Case(name="a", channels={0: tmp_path / "image.nii.gz"}, label=tmp_path / "image.nii.gz")
    write_prediction(LabelMap(array=array, geometry=geometry), case, tmp_path / "a.nii.gz")
    written = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    assert (written.GetSize(), written.GetSpacing(), written.GetOrigin()) == ((40, 30), (0.25, 1.0), (3.0, -4.0))
    assert np.array_equal(sitk.GetArrayFromImage(written), array[0])
    assert read_label_map(tmp_path / "a.nii.gz").geometry.same_grid(geometry)
