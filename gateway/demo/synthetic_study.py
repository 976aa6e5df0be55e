"""A synthetic MR study for the demo and the canary: deterministic, drawn from formulas, no patient's image.

The series `HippoCrop` has the shape of a real hippocampus crop (T1, 1 mm): a curved grey body with a thick head in
front, a white sheath, a dark horn of fluid beside it. Three more series (a head-like ellipsoid as T1, T2 and FLAIR)
are there so that routing has something to refuse.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage
from scipy.ndimage import gaussian_filter

PATIENT_ID = "DEMO-0001"
_NAMESPACE = uuid.UUID("a4c6f0b8-7d2b-5d52-8f8e-3a1d4f0a9c11")
_CROP_SHAPE = (36, 50, 36)
_SEED = 2
_FULL_SCALE = 1000.0


def write_synthetic_study(folder: Path, *, instance: str = "1") -> list[Path]:
    """Write the study below `folder`, one file per slice; `instance` makes another study with the same pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    study_uid = _uid(instance, "study")
    head = _head()
    series = (
        (1, "T1 axial", "GR", 1.0 * head, (1.0, 1.0, 6.0)),
        (2, "T2 axial", "SE", _FULL_SCALE * (head > 0) - 0.8 * head, (1.0, 1.0, 6.0)),
        (3, "FLAIR axial", "SE", 0.7 * head, (1.0, 1.0, 6.0)),
        (4, "HippoCrop", "GR", hippocampus_crop(), (1.0, 1.0, 1.0)),
    )
    written = []
    for number, description, sequence, array, spacing_mm in series:
        series_uid = _uid(instance, f"series {number}")
        frame_of_reference = _uid(instance, f"frame of reference {number}")
        for index, plane in enumerate(np.rint(np.clip(array, 0, None)).astype(np.uint16)):
            ds = _slice(plane, index, spacing_mm)
            ds.SOPInstanceUID = _uid(instance, f"series {number} slice {index}")
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            ds.StudyInstanceUID, ds.SeriesInstanceUID = study_uid, series_uid
            ds.FrameOfReferenceUID = frame_of_reference
            ds.SeriesNumber, ds.SeriesDescription, ds.ScanningSequence = number, description, sequence
            path = folder / f"series{number}-{index:03d}.dcm"
            ds.save_as(path, enforce_file_format=True)
            written.append(path)
    return written


def hippocampus_crop() -> NDArray[np.float64]:
    """(Z, Y, X) intensities, 1 mm voxels, stored as a scanner stores an axial series (index grows to L, P, S)."""
    rng = np.random.default_rng(_SEED)
    z, y, x = np.mgrid[: _CROP_SHAPE[0], : _CROP_SHAPE[1], : _CROP_SHAPE[2]].astype(float)
    t = np.linspace(0.0, 1.0, 60)  # along the body, from head to tail
    centre_y, centre_z = 44 - 36 * t, 10.5 + 13 * t**1.3
    centre_x = 18.5 - 5.5 * t + 2.5 * np.sin(np.pi * t)
    radius = 6.2 - 3.0 * t + 0.8 * np.exp(-(((t - 0.15) / 0.15) ** 2))
    body = np.full(_CROP_SHAPE, np.inf)
    horn = np.full(_CROP_SHAPE, np.inf)
    for cx, cy, cz, r in zip(centre_x, centre_y, centre_z, radius, strict=True):
        body = np.minimum(body, np.sqrt(((x - cx) / 1.25) ** 2 + (y - cy) ** 2 + ((z - cz) / 0.85) ** 2) - r)
        beside = np.sqrt(((x - cx + 3.0) / 2.2) ** 2 + (y - cy) ** 2 + (z - cz - 0.9 * r - 1.6) ** 2)
        horn = np.minimum(horn, beside - 0.35 * r)
    texture = gaussian_filter(rng.standard_normal(_CROP_SHAPE), 4)
    image = 0.70 + 0.05 * texture / texture.std()
    folds = np.sin(x * 0.28 + 0.6 * np.sin(y * 0.2)) * np.cos(y * 0.21 + z * 0.17)
    image = image - 0.22 * _inside(0.35 - folds, 0.1)
    for distance, level, softness in ((body - 2.2, 0.78, 0.5), (horn, 0.18, 0.4), (body, 0.50, 0.45)):
        weight = _inside(distance, softness)
        image = image * (1 - weight) + level * weight
    image = gaussian_filter(image, 0.6) + 0.03 * rng.standard_normal(_CROP_SHAPE)
    # Drawn with the index growing to R, A, S; stored to L, P, S.
    return np.ascontiguousarray(_FULL_SCALE * np.clip(image, 0, None)[:, ::-1, ::-1])


def _inside(distance: NDArray[np.float64], softness: float) -> NDArray[np.float64]:
    """1 inside (negative distance), 0 outside, with a soft edge."""
    weight: NDArray[np.float64] = 1 / (1 + np.exp(np.clip(distance / softness, -60, 60)))
    return weight


def _head() -> NDArray[np.float64]:
    """(Z, Y, X) = (12, 96, 80): an ellipsoid with a brighter core, dimmer to the patient's left."""
    z, y, x = np.mgrid[:12, :96, :80].astype(float)
    r = np.sqrt(((x - 39.5) / 34) ** 2 + ((y - 47.5) / 42) ** 2 + ((z - 5.5) / 9) ** 2)
    head: NDArray[np.float64] = np.where(r < 1, 400 + 300 * (r < 0.6) - 1.5 * x, 0.0)
    return head


def _slice(plane: NDArray[np.uint16], index: int, spacing_mm: tuple[float, float, float]) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(_uid("0", "implementation"))
    meta.ImplementationVersionName = "SEGGATE_DEMO"  # pydicom's own would change the bytes with its version
    ds = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.Modality = MRImageStorage, "MR"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    ds.PatientName, ds.PatientID = "Synthetic^Demo", PATIENT_ID
    ds.PatientBirthDate, ds.PatientSex = "19700101", "O"
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = "20260101"
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = "080000"
    ds.AccessionNumber, ds.StudyID, ds.ReferringPhysicianName = "DEMO-1", "1", ""
    ds.StudyDescription, ds.BodyPartExamined, ds.PatientPosition = "Synthetic MR of the head", "HEAD", "HFS"
    ds.Manufacturer, ds.PositionReferenceIndicator = "synthetic", ""
    ds.SequenceVariant, ds.ScanOptions, ds.MRAcquisitionType = "NONE", "", "3D"
    ds.EchoTime, ds.RepetitionTime, ds.EchoTrainLength, ds.MagneticFieldStrength = "3.0", "2300", "1", "3"
    ds.InstanceNumber, ds.AcquisitionNumber = index + 1, 1
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.ImagePositionPatient = [-20.0, -25.0, index * spacing_mm[2]]
    ds.PixelSpacing, ds.SliceThickness = [spacing_mm[0], spacing_mm[1]], spacing_mm[2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = plane.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.WindowCenter, ds.WindowWidth = "500", "1000"
    ds.PixelData = plane.tobytes()
    return ds


def _uid(instance: str, what: str) -> str:
    """The same UID for the same thing, every time (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, f'{instance} {what}').int}"
