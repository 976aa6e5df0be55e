"""The same Segmentation the long way: highdicom is given every voxel and makes a data set of every frame."""

from __future__ import annotations

from typing import Any

import numpy as np
from highdicom.seg import Segmentation
from numpy.typing import NDArray
from pydicom.uid import ExplicitVRLittleEndian

from gateway.results import segmentation
from gateway.results.content import EncodedObject, Encoding, ResultContent
from gateway.results.identity import MANUFACTURER, component_uid
from gateway.results.result_modules import NOT_REVIEWED, ResultHeader, finished, stand_ins, write_common_modules


def whole_segmentation(content: ResultContent, encoding: Encoding) -> EncodedObject:
    """What `encode_segmentation` must equal, pixels uncompressed."""
    syntax = str(ExplicitVRLittleEndian)
    header = ResultHeader(content)
    planes = [int(z) for z in np.nonzero(content.labels.any(axis=(1, 2)))[0]] or [0]
    reference = segmentation.segmentation_reference(content, encoding=encoding)
    dataset = Segmentation(
        source_images=stand_ins(header, planes),
        pixel_array=_pixels(content, planes),
        segmentation_type=encoding,
        segment_descriptions=[segmentation.segment_item(content, segment) for segment in content.segments],
        series_instance_uid=reference.series_instance_uid,
        series_number=header.series_number("SEG"),
        sop_instance_uid=reference.sop_instance_uid,
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MANUFACTURER,
        software_versions=content.software_version,
        device_serial_number=content.identity.model.weights_digest[:16],
        transfer_syntax_uid=syntax,
        content_label="AI_SEGMENTATION",
        content_description=f"{content.identity.model.name[:40]}: {NOT_REVIEWED}",
        omit_empty_frames=bool(content.labels.any()),
    )
    write_common_modules(dataset, header, role="SEG", encoding=encoding)
    segmentation.restore_references(dataset, content)
    uid = component_uid(content.identity, role="SEG", encoding=encoding, component="dimensions")
    for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid
    dataset.PositionReferenceIndicator = header.attributes.get("PositionReferenceIndicator")
    dataset.ContentCreatorName = None
    return finished(dataset, header, role="SEG", encoding=encoding, transfer_syntax_uid=syntax)


def _pixels(content: ResultContent, planes: list[int]) -> NDArray[Any]:
    """(planes, Y, X) segment numbers, or (planes, Y, X, segments) 0/1 where segments overlap."""
    if not content.overlapping:
        numbers: NDArray[Any] = content.segment_number_table()[content.labels[planes]]
        return numbers
    masks = [np.isin(content.labels[planes], segment.region) for segment in content.segments]
    return np.stack(masks, axis=-1).astype(np.uint8)
