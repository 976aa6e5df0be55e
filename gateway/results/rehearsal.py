"""A rehearsal at start: encode an invented result once and throw it away.

The libraries that write SEG and SR load their dictionaries at first use, which takes seconds; the first study of the
day shall not wait for them. What cannot be encoded here cannot be encoded for a patient either, so a failure is loud.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage

from engine.manifest import Code
from engine.volume import Geometry
from gateway.results.content import ResultContent, SegmentContent
from gateway.results.identity import ModelIdentity, ResultIdentity
from gateway.results.quality import Check, Verdict
from gateway.results.segmentation import encode_segmentation
from gateway.results.structured_report import encode_structured_report

_ROOT = "2.25.1"


@dataclass(frozen=True, kw_only=True)
class _Frame:
    sop_class_uid: str
    sop_instance_uid: str
    frame_number: int | None
    position_mm: tuple[float, float, float]


def rehearse() -> None:
    """Encode a SEG and an SR of two invented slices; raises what the encoders raise."""
    content = _content()
    encode_segmentation(content, encoding="BINARY")
    encode_structured_report(content, segmentation="BINARY")


def _content() -> ResultContent:
    header = Dataset()
    header.SOPClassUID, header.SOPInstanceUID = MRImageStorage, f"{_ROOT}.1"
    header.StudyInstanceUID, header.SeriesInstanceUID = f"{_ROOT}.2", f"{_ROOT}.3"
    header.Modality, header.PatientName, header.PatientID = "MR", "", ""
    header.Rows, header.Columns = 8, 8
    header.PixelSpacing, header.SliceThickness = [1.0, 1.0], 1.0
    header.ImageOrientationPatient, header.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 0]
    labels = np.zeros((2, 8, 8), dtype=np.uint8)
    labels[:, 2:5, 2:5] = 1
    organ = Code(scheme="SCT", value="91723000", meaning="Anatomical Structure")
    return ResultContent(
        identity=ResultIdentity(
            study_instance_uid=f"{_ROOT}.2",
            series_instance_uid=f"{_ROOT}.3",
            part="",
            model=ModelIdentity(
                name="rehearsal", version="0.0.0", weights_digest="0" * 64, configuration_digest="0" * 64
            ),
            content_digest="0" * 64,
        ),
        labels=labels,
        geometry=Geometry(shape=(2, 8, 8), affine_lps=np.eye(4)),
        frames=[
            _Frame(
                sop_class_uid=str(MRImageStorage),
                sop_instance_uid=f"{_ROOT}.{10 + z}",
                frame_number=None,
                position_mm=(0.0, 0.0, float(z)),
            )
            for z in range(2)
        ],
        header=header,
        modality="MR",
        frame_of_reference_uid=f"{_ROOT}.4",
        segments=(
            SegmentContent(
                number=1,
                value=1,
                region=(1,),
                name="rehearsal",
                category=organ,
                type=organ,
                laterality=None,
                colour=(128, 128, 128),
                voxels=18,
                volume_ml=0.018,
                mean_intensity=1.0,
                confidence=1.0,
                unit="1",
            ),
        ),
        verdict="pass",
        checks=[Check(name="empty", segment=None, value=18.0, limit="some", verdict=Verdict.PASS)],
        software_version="0",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
