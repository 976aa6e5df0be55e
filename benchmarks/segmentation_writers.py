"""One whole-body label map → DICOM Segmentation, for benchmarks/segmentation.py, by this gateway or by highdicom.

    python -m benchmarks.segmentation_writers seggate|highdicom BINARY|LABELMAP SERIES LABELS.npy OUTPUT

Prints the seconds from label map and headers in memory to the closed file, of wall clock and of CPU; BINARY includes
what is loaded at first use.
"""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAME, VERSION = "whole-body", "1.0.0"
CATEGORY = ("91723000", "SCT", "Anatomical Structure")


def main() -> None:
    who, encoding, series, labels, output = sys.argv[1:]
    write = write_ours if who == "seggate" else write_with_highdicom
    print(*write(encoding, sorted(Path(series).glob("*.dcm")), np.load(labels), Path(output)))


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def elapsed(began: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = now()
    return wall - began[0], cpu - began[1]


def write_ours(encoding: Any, files: list[Path], labels: NDArray[np.uint8], output: Path) -> tuple[float, float]:
    from engine.manifest import Code
    from gateway.results.content import ResultContent, SegmentContent
    from gateway.results.identity import ModelIdentity, ResultIdentity
    from gateway.results.rehearsal import rehearse
    from gateway.results.segmentation import encode_segmentation
    from gateway.results.series import read_series

    (part,) = read_series(files, only_headers=True)
    category = Code(scheme=CATEGORY[1], value=CATEGORY[0], meaning=CATEGORY[2])
    segments = tuple(
        SegmentContent(
            number=value,
            value=value,
            region=(value,),
            name=f"structure {value}",
            category=category,
            type=category,
            laterality=None,
            colour=(value, 255 - value, 128),
            voxels=1,  # a Segmentation does not say how many
            volume_ml=part.geometry.voxel_volume_ml,
            mean_intensity=None,
            confidence=None,
            unit="1",
        )
        for value in range(1, 105)
    )
    content = ResultContent(
        identity=ResultIdentity(
            study_instance_uid=part.study_instance_uid,
            series_instance_uid=part.series_instance_uid,
            part=part.part,
            model=ModelIdentity(name=NAME, version=VERSION, weights_digest="0" * 64, configuration_digest="0" * 64),
            content_digest="0" * 64,
        ),
        labels=labels,
        geometry=part.geometry,
        frames=part.frames,
        header=part.headers[0],
        modality=part.modality,
        frame_of_reference_uid=part.frame_of_reference_uid,
        segments=segments,
        verdict="pass",
        checks=(),
        software_version="0",
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
    )
    if encoding == "LABELMAP":
        rehearse()  # as every worker does at its start: this figure is of the writing alone
    began = now()
    made = encode_segmentation(content, encoding=encoding)
    with output.open("wb") as file:
        for chunk in made.chunks():
            file.write(chunk)
    return elapsed(began)


def write_with_highdicom(
    encoding: str, files: list[Path], labels: NDArray[np.uint8], output: Path
) -> tuple[float, float]:
    """As in the section on creating segmentations of highdicom's documentation, from one label map; LABELMAP in RLE."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom import dcmread
    from pydicom.sr.codedict import codes
    from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

    images = [dcmread(file) for file in files]
    began = now()
    algorithm = AlgorithmIdentificationSequence(name=NAME, version=VERSION, family=codes.DCM.ArtificialIntelligence)
    segmentation = Segmentation(
        source_images=images,
        pixel_array=labels,
        segmentation_type=encoding,
        segment_descriptions=[
            SegmentDescription(
                segment_number=value,
                segment_label=f"structure {value}",
                segmented_property_category=CodedConcept(*CATEGORY),
                segmented_property_type=CodedConcept(*CATEGORY),
                algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
                tracking_uid=generate_uid(),
                tracking_id=f"structure {value}",
            )
            for value in range(1, 105)
        ],
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="Manufacturer",
        manufacturer_model_name="Model",
        software_versions="v1",
        device_serial_number="Device XYZ",
        transfer_syntax_uid=ExplicitVRLittleEndian if encoding == "BINARY" else RLELossless,
    )
    segmentation.save_as(output)
    return elapsed(began)


if __name__ == "__main__":
    main()
