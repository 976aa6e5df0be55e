"""NIfTI files (and whatever else SimpleITK reads) ↔ volumes and label maps, in the voxel order of the file."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from engine.errors import InputRejected, NotFinite
from engine.volume import Geometry, LabelMap, Volume

# ITK refuses directions that are not orthonormal; the header itself holds float32.
_ORTHOGONALITY = 1e-4


def read_nifti(paths: Sequence[Path]) -> Volume:
    """One file per channel, in channel order, all on one grid, in the voxel order as stored.

    Raises InputRejected for a file that cannot be read, is not 2D or 3D with one value per voxel, lies on another
    grid than the first; NotFinite (one of these) when it holds NaN or infinity.
    """
    if not paths:
        raise InputRejected("no image file was given")
    channels: list[Any] = []
    geometry: Geometry | None = None
    for path in paths:
        array, grid = _read(path)
        if geometry is None:
            geometry = grid
        elif not geometry.same_grid(grid):
            raise InputRejected(f"{path.name}: lies on another grid than {paths[0].name}; all channels must share one")
        values = array.astype(np.float32)
        if not np.isfinite(values).all():
            raise NotFinite(f"{path.name}: holds NaN or infinity, correct it at the source")
        channels.append(values)
    if geometry is None:
        raise InputRejected("no image file was given")
    return Volume(array=np.stack(channels), geometry=geometry)


def read_label_map(path: Path) -> LabelMap:
    """A label map in the voxel order as stored; InputRejected when it holds anything but whole numbers >= 0, as
    NotFinite when that is NaN or infinity."""
    array, geometry = _read(path)
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise NotFinite(f"{path.name}: holds NaN or infinity, correct it at the source")
        if not np.array_equal(array, np.rint(array)):
            raise InputRejected(f"{path.name}: a label map holds whole numbers only")
        array = array.astype(np.int64)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise InputRejected(f"{path.name}: labels from {low} to {high}; 0 to 65535 are allowed")
    return LabelMap(array=array.astype(np.uint8 if high < 256 else np.uint16), geometry=geometry)


def read_spacing_mm(path: Path) -> tuple[float, float, float]:
    """Spacing (z, y, x) in mm to the last bit as the file states it and as nnU-Net's planner takes it; an affine
    carries rounding noise. A 2D file gets 999 times its coarser spacing along z, as in nnU-Net.

    Reads the header only. Raises InputRejected when there is none.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputRejected(f"{path.name}: not readable as an image") from error
    spacing = [abs(float(value)) for value in reader.GetSpacing()]
    if len(spacing) == 2:
        spacing.append(999.0 * max(spacing))
    x, y, z = spacing[:3]
    return z, y, x


def read_orientation(path: Path) -> str:
    """The orientation code of the voxels as stored (engine/volume.py), from the header. Raises InputRejected when there
    is none."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputRejected(f"{path.name}: not readable as an image") from error
    dimensions = reader.GetDimension()
    affine = np.eye(4)
    affine[:dimensions, :dimensions] = np.reshape(reader.GetDirection(), (dimensions, dimensions))
    return Geometry(shape=(1, 1, 1), affine_lps=affine).orientation


def write_nifti(labels: LabelMap, path: Path) -> None:
    """The label map as a file with its own geometry; ValueError on a sheared grid, which NIfTI by ITK cannot hold."""
    write_image(labels.array, labels.geometry, path)


def write_image(array_ZYX: NDArray[Any], geometry: Geometry, path: Path) -> None:
    """One channel or label map (Z, Y, X) as a file, in the type of its array. ValueError on a sheared grid, as above;
    OSError when the file cannot be written."""
    direction = geometry.direction
    if np.abs(direction.T @ direction - np.eye(3)).max() > _ORTHOGONALITY:
        raise ValueError(f"{path.name}: the grid is sheared (gantry tilt) and cannot be written by ITK")
    image = sitk.GetImageFromArray(array_ZYX)
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(direction.ravel().tolist())
    try:
        sitk.WriteImage(image, str(path), True)
    except RuntimeError as error:
        raise OSError(f"{path.name}: cannot be written; is the disk full?") from error


def check_stored(path: Path) -> None:
    """Refuses (InputRejected, NotFinite) a NIfTI-1 file that ends before its last voxel, or that stores NaN or infinity
    as floating point: ITK reads both as 0, without a word."""
    if not path.name.endswith((".nii", ".nii.gz")):
        return
    try:
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
        for order in "<>":
            header = np.dtype(
                {
                    "names": ["size", "dim", "datatype", "bitpix", "offset"],
                    "formats": [f"{order}i4", f"8{order}i2", f"{order}i2", f"{order}i2", f"{order}f4"],
                    "offsets": [0, 40, 70, 72, 108],
                    "itemsize": 348,
                }
            )
            fields = np.frombuffer(content, header, count=1)[0]
            if int(fields["size"]) != 348:
                continue
            stored = memoryview(content)[int(fields["offset"]) :]
            size = math.prod(int(n) for n in fields["dim"][1 : 1 + int(fields["dim"][0])]) * int(fields["bitpix"]) // 8
            if len(stored) < size:
                raise InputRejected(f"{path.name}: ends before its last voxel ({len(stored)} of {size} bytes)")
            kind = {16: f"{order}f4", 64: f"{order}f8"}.get(int(fields["datatype"]))
            if kind is not None and not np.isfinite(np.frombuffer(stored[:size], kind)).all():
                raise NotFinite(f"{path.name}: holds NaN or infinity, correct it at the source")
            return
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputRejected(f"{path.name}: not readable as an image") from error


def _read(path: Path) -> tuple[Any, Geometry]:
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise InputRejected(f"{path.name}: not readable as an image") from error
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() not in (2, 3):
        raise InputRejected(
            f"{path.name}: {image.GetDimension()} axes with {image.GetNumberOfComponentsPerPixel()} values a voxel; "
            "a 2D or 3D image with one value a voxel is needed"
        )
    check_stored(path)
    array = sitk.GetArrayFromImage(image)
    if array.ndim == 2:
        image, array = sitk.JoinSeries(image), array[None]
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return array, Geometry(shape=array.shape, affine_lps=affine)
