"""A CT series of a body that never was, with a label map of 104 structures on its grid; the same at each call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

SPACING_MM = (1.0, 0.8, 0.8)
STRUCTURES = 104
_ROOT = "2.25.104"


def label_map(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """(Z, Y, X): structures of anatomical sizes (some 5 voxels wide, some through a third of the body) with uneven
    surfaces; later ones push earlier ones aside, and the first and last slices are empty."""
    draw = np.random.default_rng(104)
    labels = np.zeros(shape, dtype=np.uint8)
    size = np.array(shape)
    for value in range(1, STRUCTURES + 1):
        radii = np.maximum(2.5, size * np.array([0.12, 0.05, 0.05]) * np.exp(draw.normal(0.0, 0.5, 3)))
        centre = draw.uniform(0.1, 0.9, 3) * [size[0], 0, 0] + draw.normal(0.5, 0.11, 3) * [0, size[1], size[2]]
        low = np.clip(np.floor(centre - radii), 4, size - 4).astype(int)
        high = np.clip(np.ceil(centre + radii) + 1, 4, size - 4).astype(int)
        if (high <= low).any():
            continue
        z, y, x = (np.arange(*ends, dtype=np.float32) for ends in zip(low, high, strict=True))
        u, v, w = ((axis - c) / r for axis, c, r in zip((z, y, x), centre, radii, strict=True))
        uneven = 0.15 * np.sin(5 * v[:, None] + value) * np.cos(4 * w + value)
        inside = u[:, None, None] ** 2 + (v[:, None] ** 2 + w**2 + uneven)[None] < 1
        labels[low[0] : high[0], low[1] : high[1], low[2] : high[2]][inside] = value
    return labels


def write_series(folder: Path, shape: tuple[int, int, int], labels: NDArray[np.uint8]) -> list[Path]:
    """Axial slices, head first, in Explicit VR Little Endian; structures differ in density, with noise."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(1)
    noise = draw.normal(0, 12, shape[1:])
    y, x = np.ogrid[-1 : 1 : shape[1] * 1j, -1 : 1 : shape[2] * 1j]
    body = np.where((x / 0.8) ** 2 + (y / 0.6) ** 2 < 1, 1024, 24) + noise
    density = np.concatenate([[0], draw.normal(40, 60, STRUCTURES)])
    files = []
    for z in range(shape[0]):
        pixels = np.clip(np.roll(body, 7 * z, axis=1) + density[labels[z]], 0, 4095).astype(np.uint16)
        files.append(folder / f"{z:04}.dcm")
        _slice(z, shape, pixels).save_as(files[-1], enforce_file_format=True)
    return files


def _slice(z: int, shape: tuple[int, int, int], pixels: NDArray[np.uint16]) -> Dataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = UID(f"{_ROOT}.4.{z + 1}")
    image = Dataset()
    image.file_meta = meta
    image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, f"{_ROOT}.4.{z + 1}"
    image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = (f"{_ROOT}.{n}" for n in (1, 2, 3))
    image.PatientName, image.PatientID, image.PatientBirthDate, image.PatientSex = "Whole^Body", "WB-104", "", "O"
    image.StudyDate, image.StudyTime, image.StudyID, image.AccessionNumber = "20260102", "101112", "1", "WB104"
    image.ReferringPhysicianName = ""
    image.SeriesDate = image.ContentDate = "20260102"
    image.SeriesTime = image.ContentTime = "101112"
    image.Modality, image.Manufacturer, image.SeriesNumber, image.InstanceNumber = "CT", "None", 1, z + 1
    image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    image.BodyPartExamined, image.PatientPosition = "WHOLEBODY", "HFS"
    image.KVP, image.AcquisitionNumber, image.PositionReferenceIndicator = 120, 1, ""
    image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    image.ImagePositionPatient = [-200, -200, z * SPACING_MM[0]]
    image.PixelSpacing, image.SliceThickness = [SPACING_MM[1], SPACING_MM[2]], SPACING_MM[0]
    image.Rows, image.Columns = shape[1:]
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    image.RescaleIntercept, image.RescaleSlope, image.RescaleType = -1024, 1, "HU"
    image.PixelData = pixels.tobytes()
    return image
