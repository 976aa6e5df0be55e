"""engine.nifti_forms: a NIfTI file that states two places at once is refused, for images and labels alike."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from engine.errors import InputRejected
from engine.nifti import read_label_map, read_nifti, read_orientation, write_nifti
from engine.nifti_forms import TOLERANCE, check_forms
from engine.volume import Geometry, LabelMap, reorientation
from tests.unit.test_volume import oblique

CODES, PIXDIM, QUATERNION, ROWS = 252, 76, 256, 280  # nifti1.h
SHAPE = (4, 5, 6)


def _written(path: Path, geometry: Geometry | None = None) -> Path:
    grid = geometry or Geometry(shape=SHAPE, affine_lps=np.diag([0.5, 0.6, 2.0, 1.0]))
    write_nifti(LabelMap(array=np.ones(grid.shape, np.uint8), geometry=grid), path)
    return path


def _edited(path: Path, edit: Callable[[bytearray], None]) -> Path:
    is_compressed = path.name.endswith(".gz")
    content = bytearray(gzip.decompress(path.read_bytes()) if is_compressed else path.read_bytes())
    edit(content)
    path.write_bytes(gzip.compress(content) if is_compressed else content)
    return path


def _rows(content: bytearray) -> NDArray[Any]:
    return np.frombuffer(content, "<f4", 12, ROWS).reshape(3, 4).copy()


def _mirror(content: bytearray) -> None:
    """The sform on the same voxels, the other way along x."""
    rows = _rows(content)
    rows[:, 3] += rows[:, 0] * (SHAPE[2] - 1)
    rows[:, 0] *= -1
    content[ROWS : ROWS + 48] = rows.tobytes()


def _move(away_mm: float) -> Callable[[bytearray], None]:
    def edit(content: bytearray) -> None:
        rows = _rows(content)
        rows[1, 3] += away_mm
        content[ROWS : ROWS + 48] = rows.tobytes()

    return edit


def _codes(qform: int, sform: int) -> Callable[[bytearray], None]:
    def edit(content: bytearray) -> None:
        content[CODES : CODES + 4] = np.array([qform, sform], "<i2").tobytes()

    return edit


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("codes", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize(
    "read", [lambda path: read_nifti([path]), read_label_map, read_orientation], ids=["image", "label", "orientation"]
)
def test_a_file_that_is_its_own_mirror_image_is_refused(
    tmp_path: Path, read: Callable[[Path], Any], codes: tuple[int, int], ending: str
) -> None:
    path = _edited(_written(tmp_path / f"a{ending}"), _codes(*codes))
    read(path)
    with pytest.raises(InputRejected, match=rf"a{ending}: its qform and sform contradict.*5 voxels.*copy it"):
        read(_edited(path, _mirror))


@pytest.mark.parametrize("codes", [(0, 1), (1, 0), (0, 0)])
def test_one_of_the_two_alone_is_no_contradiction(tmp_path: Path, codes: tuple[int, int]) -> None:
    path = _edited(_edited(_written(tmp_path / "a.nii.gz"), _mirror), _codes(*codes))
    assert read_nifti([path]).array.all()


def test_the_two_may_differ_by_what_rounding_does(tmp_path: Path) -> None:
    diagonal_mm = float(np.linalg.norm([6 * 0.5, 5 * 0.6, 4 * 2.0]))
    check_forms(_edited(_written(tmp_path / "a.nii"), _move(0.9 * TOLERANCE * diagonal_mm)))
    for away_mm in (1.1 * TOLERANCE * diagonal_mm, 300.0, float("nan")):
        with pytest.raises(InputRejected, match=r"b\.nii: its qform and sform"):
            check_forms(_edited(_written(tmp_path / "b.nii"), _move(away_mm)))


@pytest.mark.parametrize("code", ["".join(c) for c in itertools.product("LR", "AP", "SI")] + ["ASR", "SPL", "IRA"])
def test_what_is_written_here_agrees_with_itself_whichever_way_it_runs(tmp_path: Path, code: str) -> None:
    for number, grid in enumerate((Geometry(shape=SHAPE, affine_lps=np.diag([0.5, 0.6, 2.0, 1.0])), oblique())):
        path = _written(tmp_path / f"{number}.nii.gz", reorientation(grid, code).target)
        assert read_orientation(path) == code
        check_forms(path)


@pytest.mark.parametrize("seed", range(20))
def test_every_rotation_near_half_a_turn_agrees_with_itself(tmp_path: Path, seed: int) -> None:
    """The part of the quaternion that is not stored is nearly nothing there."""
    rng = np.random.default_rng(seed)
    axis, angle = rng.normal(size=3), np.pi - 10.0 ** rng.uniform(-7, -1)
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross) @ np.diag([0.7, 0.7, 3])
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    check_forms(_written(tmp_path / "a.nii", Geometry(shape=(60, 512, 512), affine_lps=affine)))


def test_big_endian_and_nifti_2_are_looked_at_too(tmp_path: Path) -> None:
    path = _written(tmp_path / "little.nii")
    content = bytearray(path.read_bytes())
    _mirror(content)
    for offset, count, size in [(0, 1, 4), (40, 8, 2), (PIXDIM, 8, 4), (CODES, 2, 2), (QUATERNION, 18, 4)]:
        part = np.frombuffer(content, f"<i{size}", count, offset).byteswap()
        content[offset : offset + part.nbytes] = part.tobytes()
    (tmp_path / "big.nii").write_bytes(content)
    with pytest.raises(InputRejected, match=r"big\.nii: its qform"):
        check_forms(tmp_path / "big.nii")
    first = path.read_bytes()
    second = bytearray(540 + 4)
    second[:12] = np.array([540], "<i4").tobytes() + b"n+2\0\r\n\x1a\n"
    for place, source, kind, count, wide in (
        (16, 40, "<i2", 8, "<i8"), (104, PIXDIM, "<f4", 8, "<f8"), (344, CODES, "<i2", 2, "<i4"),
        (352, QUATERNION, "<f4", 18, "<f8"),
    ):  # fmt: skip
        values = np.frombuffer(first, kind, count, source).astype(wide).tobytes()
        second[place : place + len(values)] = values
    (tmp_path / "second.nii").write_bytes(second)
    check_forms(tmp_path / "second.nii")
    second[400:408] = np.array([0.5], "<f8").tobytes()  # srow_x[0] of an LPS grid is negative
    (tmp_path / "second.nii").write_bytes(second)
    with pytest.raises(InputRejected, match=r"second\.nii: its qform"):
        check_forms(tmp_path / "second.nii")


def test_a_file_with_two_axes_is_compared_in_its_plane(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.ones((4, 6), np.int16))
    sitk.WriteImage(image, str(tmp_path / "a.nii"))
    check_forms(tmp_path / "a.nii")
    with pytest.raises(InputRejected, match="its qform and sform"):
        check_forms(_edited(tmp_path / "a.nii", _mirror))


def test_what_is_no_nifti_file_is_passed_over(tmp_path: Path) -> None:
    for name, content in (("a.mha", b"x"), ("a.nii", b""), ("a.nii.gz", b"no gzip"), ("b.nii", bytes(600))):
        (tmp_path / name).write_bytes(content)
        check_forms(tmp_path / name)


@pytest.mark.peer("shared-data")
def test_real_files_agree_with_themselves(shared_data: Path) -> None:
    files = [path for path in shared_data.rglob("*.nii*") if path.name.endswith((".nii", ".nii.gz"))]
    assert len(files) > 50
    for path in files:
        check_forms(path)
