"""One folder of DICOM slices → voxels, for benchmarks/series.py, by this gateway or by SimpleITK.

    python -m benchmarks.series_readers seggate|simpleitk FOLDER

Prints the seconds from the folder's name to the voxels, and the SHA-256 of the voxels as float32.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    who, folder = sys.argv[1:]
    seconds, digest = read_ours(Path(folder)) if who == "seggate" else read_with_simpleitk(folder)
    print(seconds, digest)


def read_ours(folder: Path) -> tuple[float, str]:
    from gateway.results.series import read_series

    began = time.perf_counter()
    (part,) = read_series(list(folder.iterdir()))
    seconds = time.perf_counter() - began
    if part.volume is None:
        raise SystemExit("no voxels were read")
    return seconds, _digest(list(part.volume.array[0]))


def read_with_simpleitk(folder: str) -> tuple[float, str]:
    """As in its documentation's example of a series."""
    import SimpleITK as sitk

    began = time.perf_counter()
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder))
    image = reader.Execute()
    seconds = time.perf_counter() - began
    return seconds, _digest(list(sitk.GetArrayViewFromImage(image)))


def _digest(planes: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for plane in planes:
        digest.update(plane.astype(np.float32).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
