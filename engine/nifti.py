"""NIfTI files (and whatever else SimpleITK reads) ↔ volumes and label maps, in the voxel order of the file."""

from __future__ import annotations

import errno
import gzip
import math
import os
import zlib
from collections.abc import Sequence
from io import BufferedIOBase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from engine.errors import InputRejected, NotFinite
from engine.nifti_forms import check_forms
from engine.volume import Geometry, LabelMap, Volume
from engine.whole_file import whole_file

# nifti1.h: what is read here of the header, and the types with one number a voxel.
_NIFTI1 = np.dtype(
    {
        "names": ["size", "dim", "datatype", "bitpix", "offset", "slope", "intercept"],
        "formats": ["<i4", "<8i2", "<i2", "<i2", "<f4", "<f4", "<f4"],
        "offsets": [0, 40, 70, 72, 108, 112, 116],
        "itemsize": 348,
    }
)
_NIFTI_TYPES = MappingProxyType(
    {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
)
_CHUNK = 2**20
_GIPL_HEADER = 256
# Deflate makes at most 1032 bytes of one.
_MOST_DEFLATED = 1100
# ITK refuses directions that are not orthonormal; the header itself holds float32.
_ORTHOGONALITY = 1e-4


def read_nifti(paths: Sequence[Path]) -> Volume:
    """One file per channel, in channel order, all on one grid, in the voxel order as stored.

    Raises InputRejected for a file that cannot be read, is not 2D or 3D with one value per voxel, lies on another
    grid than the first, or states two places at once (engine/nifti_forms.py), as all that read here do; NotFinite (one
    of these) when it holds NaN or infinity.
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
        values = array.astype(np.float32, copy=False)
        if np.issubdtype(array.dtype, np.floating) and not _all_finite(values):
            raise NotFinite(f"{path.name}: holds NaN or infinity, correct it at the source")
        channels.append(values)
    if geometry is None:
        raise InputRejected("no image file was given")
    return Volume(array=channels[0][None] if len(channels) == 1 else np.stack(channels), geometry=geometry)


def read_label_map(path: Path) -> LabelMap:
    """A label map in the voxel order as stored, uint8 or uint16. Raises InputRejected for values beyond 0 to 65535, and
    as `read_whole_numbers` does."""
    found = read_whole_numbers(path)
    low, high = int(found.array.min()), int(found.array.max())
    if low < 0 or high > 65535:
        raise InputRejected(f"{path.name}: labels from {low} to {high}; 0 to 65535 are allowed")
    return narrowed(found)


def read_whole_numbers(path: Path) -> LabelMap:
    """A label map whatever its values, in an integer type that holds them; `narrowed` makes a usual one of it. Raises
    InputRejected when it holds fractions or numbers beyond 64 bits, as NotFinite for NaN and infinity."""
    array, geometry = _read(path)
    if np.issubdtype(array.dtype, np.floating):
        if not _all_finite(array):
            raise NotFinite(f"{path.name}: holds NaN or infinity, correct it at the source")
        if not all(np.array_equal(plane, np.rint(plane)) for plane in array):
            raise InputRejected(f"{path.name}: a label map holds whole numbers only")
        low, high = float(array.min()), float(array.max())
        if low < -(2.0**63) or high >= 2.0**63:
            raise InputRejected(f"{path.name}: labels from {low:g} to {high:g}; 0 to 65535 are allowed")
        array = array.astype(np.uint16 if low >= 0 and high <= 65535 else np.int64)
    return LabelMap(array=array, geometry=geometry)


def narrowed(labels: LabelMap) -> LabelMap:
    """The same label map as uint8 or uint16, which must hold its values."""
    array = labels.array.astype(np.uint8 if int(labels.array.max()) < 256 else np.uint16)
    return LabelMap(array=array, geometry=labels.geometry)


def read_spacing_mm(path: Path) -> tuple[float, float, float]:
    """Spacing (z, y, x) in mm to the last bit as the file states it and as nnU-Net's planner takes it; an affine
    carries rounding noise. A 2D file gets 999 times its coarser spacing along z, as in nnU-Net.

    Reads the header only. Raises InputRejected when there is none.
    """
    reader = _header(path)
    spacing = [abs(float(value)) for value in reader.GetSpacing()]
    x, y, z = [*spacing, _flat_spacing_mm(spacing)][:3]
    return z, y, x


def read_orientation(path: Path) -> str:
    """The orientation code of the voxels as stored (engine/volume.py), from the header. Raises InputRejected when there
    is none."""
    reader = _header(path)
    dimensions = reader.GetDimension()
    affine = np.eye(4)
    affine[:dimensions, :dimensions] = np.reshape(reader.GetDirection(), (dimensions, dimensions))
    return Geometry(shape=(1, 1, 1), affine_lps=affine).orientation


def read_geometry(path: Path) -> Geometry:
    """The grid of the file, from its header. Raises InputRejected for what is no 2D or 3D image, as `read_nifti`."""
    return _grid(_header(path), path.name)


def read_itk_grid(path: Path) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Spacing, origin and direction as ITK gives them (x, y, z; direction row by row), to the last bit; of two axes for
    a 2D file. Raises InputRejected when there is no header."""
    reader = _header(path)
    return tuple(reader.GetSpacing()), tuple(reader.GetOrigin()), tuple(reader.GetDirection())


def is_flat(path: Path) -> bool:
    """Whether the file has two axes, and not a third with one voxel. Raises InputRejected when there is no header."""
    return bool(_header(path).GetDimension() == 2)


def write_nifti(labels: LabelMap, path: Path, *, flat: bool = False) -> None:
    """The label map as a file with its own geometry, as `write_image` writes it."""
    write_image(labels.array, labels.geometry, path, flat=flat)


def write_labels_like(labels: LabelMap, like: Path, path: Path) -> None:
    """The label map on the grid that the file `like` states, to the last bit and in nnU-Net's type (uint8 below 255),
    so that the file is the one that nnU-Net's SimpleITKIO writes. Else as `write_image`.

    Raises InputRejected when `like` cannot be read any more.
    """
    grid = read_itk_grid(like)
    array = labels.array.astype(np.uint8 if int(labels.array.max()) < 255 else np.uint16, copy=False)
    _write(array[0] if len(grid[0]) == 2 else array, grid, path)


def write_image(array_ZYX: NDArray[Any], geometry: Geometry, path: Path, *, flat: bool = False) -> None:
    """One channel or label map (Z, Y, X) as a file, in the type of its array; the whole file or the old one. `flat`
    writes a single slice as a file with two axes.

    It is read again before it takes its place: ITK does not notice a full disk. OSError when the file cannot be written
    to its end; ValueError on a sheared grid, which NIfTI by ITK cannot hold.
    """
    direction, axes = geometry.direction, 2 if flat else 3
    if np.abs(direction.T @ direction - np.eye(3)).max() > _ORTHOGONALITY:
        raise ValueError(f"{path.name}: the grid is sheared (gantry tilt) and cannot be written by ITK")
    if flat and len(array_ZYX) != 1:
        raise ValueError(f"{path.name}: {len(array_ZYX)} slices do not go into a file with two axes")
    grid = (geometry.spacing_mm[::-1][:axes], geometry.origin_mm[:axes], direction[:axes, :axes].ravel().tolist())
    _write(array_ZYX[0] if flat else array_ZYX, grid, path)


def _write(array: NDArray[Any], grid: tuple[Any, Any, Any], path: Path) -> None:
    """`grid`: spacing, origin and direction as ITK takes them."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(grid[0])
    image.SetOrigin(grid[1])
    image.SetDirection(grid[2])
    with whole_file(path, keeps_ending=True) as made:
        try:
            sitk.WriteImage(image, str(made), True)
        except RuntimeError as error:
            raise OSError(f"{path.name}: cannot be written; is the disk full?") from error
        _check_written(made, path.name, array)


def _check_written(made: Path, name: str, array: NDArray[Any]) -> None:
    with made.open("rb") as file:
        os.fsync(file.fileno())  # says what a disk across the network could not take
    try:
        is_whole = np.array_equal(_read(made)[0].reshape(array.shape), array)
    except (InputRejected, ValueError):
        is_whole = False
    if not is_whole:
        raise OSError(errno.ENOSPC, f"{name}: was not written to its end; is the disk full?")


def _header(path: Path) -> sitk.ImageFileReader:
    """A reader that knows the file's header. Raises InputRejected when there is none, or when it says two places."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputRejected(f"{path.name}: not readable as an image") from error
    try:
        check_forms(path)
    except OSError as error:
        raise InputRejected(f"{path.name}: not readable as an image") from error
    return reader


def _flat_spacing_mm(spacing_mm: Sequence[float]) -> float:
    """What nnU-Net takes for the distance of the slices of a file with two axes, so that it never mixes them."""
    return 999.0 * max(spacing_mm)


def _read(path: Path) -> tuple[Any, Geometry]:
    reader = _header(path)
    geometry = _grid(reader, path.name)
    _check_gipl(reader, path)
    array = _stored_voxels(path)
    if array is None or array.size != math.prod(reader.GetSize()):
        try:
            array = sitk.GetArrayFromImage(reader.Execute())
        except RuntimeError as error:
            raise InputRejected(f"{path.name}: not readable as an image") from error
    return array.reshape(geometry.shape), geometry


def _grid(reader: sitk.ImageFileReader, name: str) -> Geometry:
    dimensions = reader.GetDimension()
    if reader.GetNumberOfComponents() != 1 or dimensions not in (2, 3):
        raise InputRejected(
            f"{name}: {dimensions} axes with {reader.GetNumberOfComponents()} values a voxel; "
            "a 2D or 3D image with one value a voxel is needed"
        )
    affine = np.eye(4)
    affine[:dimensions, :dimensions] = np.reshape(reader.GetDirection(), (dimensions, dimensions))
    affine[:dimensions, :dimensions] *= reader.GetSpacing()
    if dimensions == 2:
        affine[2, 2] = _flat_spacing_mm(reader.GetSpacing())
    affine[:dimensions, 3] = reader.GetOrigin()
    x, y, z = (*reader.GetSize(), 1)[:3]
    return Geometry(shape=(z, y, x), affine_lps=affine)


def _check_gipl(reader: sitk.ImageFileReader, path: Path) -> None:
    """ITK takes what lies in memory for the voxels that a GIPL file has no more. Raises InputRejected."""
    if path.name.endswith(".gipl"):
        voxel = sitk.Image((1,) * reader.GetDimension(), reader.GetPixelID()).GetSizeOfPixelComponent()
        size = _GIPL_HEADER + voxel * math.prod(reader.GetSize())
        if path.stat().st_size < size:
            raise InputRejected(f"{path.name}: ends before its last voxel ({path.stat().st_size} of {size} bytes)")


def _stored_voxels(path: Path) -> NDArray[Any] | None:
    """The voxels of a NIfTI-1 file, flat, as it stores them; None where ITK must read them, because they are to be
    scaled or the file is of another kind.

    Reads to the end of the file, so that a compressed one is checked. Refuses one that ends before its last voxel or
    that stores NaN or infinity as floating point: ITK reads both as 0, without a word.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        return None
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            start = file.read(_NIFTI1.itemsize)
            if len(start) < _NIFTI1.itemsize:
                return None
            for header in (_NIFTI1, _NIFTI1.newbyteorder()):
                fields = np.frombuffer(start, header)[0]
                if int(fields["size"]) == header.itemsize:
                    return _voxels_after(file, fields, header["dim"].base.byteorder, path)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputRejected(f"{path.name}: not readable as an image") from error
    return None


def _voxels_after(file: BufferedIOBase, fields: Any, order: Any, path: Path) -> NDArray[Any] | None:
    """`file` stands behind the header of which `fields` are."""
    axes, kind = int(fields["dim"][0]), np.dtype(f"V{max(1, int(fields['bitpix']) // 8)}")
    if int(fields["datatype"]) in _NIFTI_TYPES:
        kind = np.dtype(_NIFTI_TYPES[int(fields["datatype"])]).newbyteorder(order)
    size = kind.itemsize * math.prod(int(n) for n in fields["dim"][1 : 1 + axes])
    if size > _MOST_DEFLATED * path.stat().st_size:
        raise InputRejected(f"{path.name}: ends before its last voxel: {size} bytes cannot be in so small a file")
    file.read(max(0, int(fields["offset"]) - _NIFTI1.itemsize))
    content = np.empty(size, np.uint8)
    found = 0
    while found < size and (part := file.read(min(_CHUNK, size - found))):
        content[found : found + len(part)] = np.frombuffer(part, np.uint8)
        found += len(part)
    if found < size:
        raise InputRejected(f"{path.name}: ends before its last voxel ({found} of {size} bytes)")
    while file.read(_CHUNK):
        continue
    array = content.view(kind)
    if kind.kind == "f" and not _all_finite(array):
        raise NotFinite(f"{path.name}: holds NaN or infinity, correct it at the source")
    is_plain = float(fields["slope"]) in (0.0, 1.0) and float(fields["intercept"]) == 0.0
    return array.astype(kind.newbyteorder("="), copy=False) if is_plain and kind.kind != "V" and axes <= 3 else None


def _all_finite(array: NDArray[Any]) -> bool:
    """Part by part: the answer for each voxel would be as many bytes again."""
    flat = array.reshape(-1)
    return all(np.isfinite(flat[start : start + _CHUNK]).all() for start in range(0, flat.size, _CHUNK))
