"""qform and sform: a NIfTI header may state twice where its voxels lie (nifti1.h, "3D image (volume) orientation and
location in space"), and says nothing of what counts where the two differ.

Readers choose differently: nibabel takes the sform, ITK the one or the other by their codes and shapes. Where one is
the mirror image of the other, left would be right for the one reader and not for the other.
"""

from __future__ import annotations

import gzip
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InputRejected

TOLERANCE = 1e-3
"""How far a corner may lie from itself, in diagonals of the volume (0.5 mm in 500 mm). A quaternion of float32 near
half a turn, as most are, holds angles to 0.0007."""

_NIFTI1 = np.dtype(
    {
        "names": ["size", "dim", "pixdim", "codes", "quaternion", "offset", "rows", "magic"],
        "formats": ["<i4", "<8i2", "<8f4", "<2i2", "<3f4", "<3f4", "<(3,4)f4", "S4"],
        "offsets": [0, 40, 76, 252, 256, 268, 280, 344],
        "itemsize": 348,
    }
)
_NIFTI2 = np.dtype(
    {
        "names": ["size", "magic", "dim", "pixdim", "codes", "quaternion", "offset", "rows"],
        "formats": ["<i4", "S8", "<8i8", "<8f8", "<2i4", "<3f8", "<3f8", "<(3,4)f8"],
        "offsets": [0, 4, 16, 104, 344, 352, 376, 400],
        "itemsize": 540,
    }
)
_MAGIC = (b"n+", b"ni")


def check_forms(path: Path) -> None:
    """Raises InputRejected for a NIfTI file whose qform and sform, where it has both, contradict each other. Files of
    other kinds, and headers that are none, are passed over. OSError when the file cannot be opened."""
    if not path.name.endswith((".nii", ".nii.gz")):
        return
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            start = file.read(_NIFTI2.itemsize)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return  # reading it as an image says so
    for header in (_NIFTI1, _NIFTI2):
        for kind in (header, header.newbyteorder()):
            if len(start) >= kind.itemsize:
                fields = np.frombuffer(start, kind, 1)[0]
                if int(fields["size"]) == kind.itemsize and bytes(fields["magic"]).startswith(_MAGIC):
                    _check(fields, path.name)
                    return


def _check(fields: Any, name: str) -> None:
    if min(int(code) for code in fields["codes"]) <= 0:
        return
    axes = min(max(int(fields["dim"][0]), 1), 3)
    sizes = [max(int(size), 1) for size in fields["dim"][1 : 1 + axes]]
    with np.errstate(all="ignore"):
        steps = _steps(fields["pixdim"])
        qform, sform = _qform(fields, steps)[:, [*range(axes), 3]], fields["rows"][:, [*range(axes), 3]]
        corners = np.array([[*corner, 1] for corner in product(*((0, size - 1) for size in sizes))], dtype=np.float64)
        apart = float(np.linalg.norm(corners @ (qform - sform.astype(np.float64)).T, axis=1).max())
        diagonal = float(np.linalg.norm(steps[:axes] * sizes))
    if not apart <= TOLERANCE * diagonal:  # what is no number is no agreement
        raise InputRejected(
            f"{name}: its qform and sform contradict each other (up to {apart / float(steps[:axes].min()):.3g} voxels "
            "apart), and readers choose differently between them, which may exchange left and right; find out which is "
            "right and copy it onto the other, or set the code of the wrong one to 0"
        )


def _steps(pixdim: NDArray[Any]) -> NDArray[np.float64]:
    """Distances of voxels along the three axes; nothing and what is no number count as 1, as in nifti1_io."""
    steps = np.abs(pixdim[1:4].astype(np.float64))
    return np.where(np.isfinite(steps) & (steps > 0), steps, 1.0)


def _qform(fields: Any, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """3x4, "method 2" of nifti1.h: a rotation as unit quaternion, of which the first part is not stored; pixdim[0] says
    whether the third axis is reversed."""
    b, c, d = (float(part) for part in fields["quaternion"])
    rest = 1.0 - (b * b + c * c + d * d)
    if rest < 1e-7:  # half a turn, or rounded beyond it
        b, c, d = np.array([b, c, d]) / np.sqrt(b * b + c * c + d * d)
    a = np.sqrt(rest) if rest >= 1e-7 else 0.0
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    reversal = -1.0 if float(fields["pixdim"][0]) < 0 else 1.0
    return np.column_stack([rotation * steps * (1.0, 1.0, reversal), fields["offset"].astype(np.float64)])
