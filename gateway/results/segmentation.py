"""Label array → DICOM Segmentation (PS3.3 A.51) or Label Map Segmentation (Supplement 243) with highdicom.

Frames lie exactly where the source slices lie: each takes the Image Position (Patient) of its own slice, so reversed,
oblique, irregular and tilted (sheared) stacks need no resampling. Frames without foreground are left out. A segment
without voxels is described in the Segment Sequence and has no frame; a result without any voxel has one empty frame
per segment at the first slice, because an object without frames is not a Segmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

import numpy as np
from highdicom.color import CIELabColor
from highdicom.seg import Segmentation, SegmentDescription
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.sr.coding import Code as DicomCode
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SegmentationStorage

from gateway.errors import Rejected
from gateway.results.content import EncodedObject, Encoding, ObjectReference, ResultContent, SegmentContent
from gateway.results.identity import CODING_SCHEME, MANUFACTURER, component_uid, series_instance_uid, sop_instance_uid
from gateway.results.result_modules import (
    NOT_REVIEWED,
    ResultHeader,
    algorithm_identification,
    code_item,
    coded,
    encoded_object,
    file_bytes,
    instance_references,
    side,
    stand_ins,
    write_common_modules,
)
from gateway.results.segmentation_frames import (
    MOST_BYTES,
    FrameOrder,
    bit_packed,
    bit_packed_bytes,
    encapsulated,
    frame_order,
    functional_groups,
    overlap_anywhere,
    run_length_encoded,
    segments_present,
)

LABEL_MAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"
SOP_CLASSES: dict[Encoding, str] = {"BINARY": str(SegmentationStorage), "LABELMAP": LABEL_MAP_STORAGE}
_TRANSFER_SYNTAX: dict[Encoding, str] = {"BINARY": str(ExplicitVRLittleEndian), "LABELMAP": str(RLELossless)}
_SUPERSEDED = DicomCode("SUPERSEDED", CODING_SCHEME, "Result superseded by this one")


def segmentation_reference(content: ResultContent, *, encoding: Encoding = "BINARY") -> ObjectReference:
    """The UIDs that `encode_segmentation` will write, known before anything is encoded."""
    return ObjectReference(
        sop_class_uid=SOP_CLASSES[encoding],
        sop_instance_uid=sop_instance_uid(
            content.identity, role="SEG", sop_class_uid=SOP_CLASSES[encoding], encoding=encoding
        ),
        series_instance_uid=series_instance_uid(content.identity, role="SEG", encoding=encoding),
    )


def encode_segmentation(content: ResultContent, *, encoding: Encoding = "BINARY") -> EncodedObject:
    """The Segmentation object of a result: BINARY in Explicit VR Little Endian, LABELMAP in RLE.

    Segments may overlap in BINARY only. The same content gives the same bytes. Raises Rejected when segments overlap
    in a label map, when there are none, and when the source's geometry cannot be written.
    """
    where = f"series {content.identity.series_instance_uid}"
    if not content.segments:
        raise Rejected(f"{where}: the model names no segments, so there is nothing to write; check its bundle")
    if encoding == "LABELMAP" and content.overlapping:
        raise Rejected(f"{where}: segments overlap, which a label map cannot hold; write it as BINARY")
    header = ResultHeader(content)
    present = segments_present(content)
    dataset = _one_pixel_frames(content, header, np.flatnonzero(present.any(axis=1)).tolist(), encoding)
    order = frame_order(present, [_plane(item) for item in dataset.PerFrameFunctionalGroupsSequence], encoding)
    dataset.NumberOfFrames = len(order.plane_indices)
    write_common_modules(dataset, header, role="SEG", encoding=encoding)
    restore_references(dataset, content)
    _fix_dimension_uid(dataset, component_uid(content.identity, role="SEG", encoding=encoding, component="dimensions"))
    dataset.PositionReferenceIndicator = header.attributes.get("PositionReferenceIndicator")
    dataset.ContentCreatorName = None  # no person made this
    if content.supersedes.image is not None:
        _refer_to_superseded(dataset, content.supersedes.image)
    return encoded_object(
        dataset,
        header,
        role="SEG",
        encoding=encoding,
        transfer_syntax_uid=_TRANSFER_SYNTAX[encoding],
        chunks=_chunks(content, dataset, order, encoding),
    )


def _one_pixel_frames(content: ResultContent, header: ResultHeader, planes: list[int], encoding: Encoding) -> Dataset:
    """The data set as highdicom makes it for one frame per plane of a single pixel; all else is that of the result.

    highdicom puts the planes in the order of their dimension index. Two segments stand for any number: of one alone it
    puts the number into the shared functional groups.
    """
    descriptions = [segment_item(content, segment) for segment in content.segments]
    reference = segmentation_reference(content, encoding=encoding)
    try:
        dataset = Segmentation(
            source_images=stand_ins(header, planes, rows_columns=(1, 1)),
            pixel_array=np.ones((len(planes), 1, 1), dtype=np.uint8),
            segmentation_type=encoding,
            segment_descriptions=descriptions[:2] if encoding == "BINARY" else descriptions,
            series_instance_uid=reference.series_instance_uid,
            series_number=header.series_number("SEG"),
            sop_instance_uid=reference.sop_instance_uid,
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name=MANUFACTURER,
            software_versions=content.software_version,
            device_serial_number=content.identity.model.weights_digest[:16],
            transfer_syntax_uid=_TRANSFER_SYNTAX[encoding],
            content_label="AI_SEGMENTATION",
            content_description=f"{content.identity.model.name[:40]}: {NOT_REVIEWED}",
        )
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise Rejected(
            f"series {content.identity.series_instance_uid}: its slice geometry (ImagePositionPatient (0020,0032), "
            f"ImageOrientationPatient (0020,0037)) cannot be written as a Segmentation: {error}"
        ) from error
    if encoding == "BINARY":
        dataset.SegmentSequence = descriptions
        dataset.SegmentsOverlap = "YES" if overlap_anywhere(content) else "NO"
    dataset.Rows, dataset.Columns = content.labels.shape[1:]
    return dataset


def _plane(frame: Dataset) -> int:
    """Slice z of a frame whose source is still a stand-in."""
    source = frame.DerivationImageSequence[0].SourceImageSequence[0]
    return int(str(source.ReferencedSOPInstanceUID).rpartition(".")[2]) - 1


def _chunks(
    content: ResultContent, dataset: Dataset, order: FrameOrder, encoding: Encoding
) -> Callable[[], Iterable[bytes]]:
    """The file: what pydicom writes of the data set, then the functional groups and pixels of each frame."""
    templates = [item for item in dataset.PerFrameFunctionalGroupsSequence if isinstance(item, Dataset)]
    del dataset.PerFrameFunctionalGroupsSequence, dataset.PixelData
    head = file_bytes(dataset, _TRANSFER_SYNTAX[encoding])
    if encoding == "LABELMAP":
        groups = list(functional_groups(templates, order))
        frames = run_length_encoded(content, order)
        return lambda: chain((head,), groups, encapsulated(frames))
    if bit_packed_bytes(content, order) > MOST_BYTES:
        raise Rejected(
            f"series {content.identity.series_instance_uid}: {len(order.segments)} frames are more pixel data than the "
            f"{MOST_BYTES} bytes of a BINARY Segmentation (PS3.5 7.1.1); write it as LABELMAP"
        )
    return lambda: chain((head,), functional_groups(templates, order), bit_packed(content, order))


def segment_item(content: ResultContent, segment: SegmentContent) -> SegmentDescription:
    """The Segment Sequence item: codes, side, colour, algorithm, tracking UID."""
    description = SegmentDescription(
        segment_number=segment.number,
        segment_label=segment.name[:64],
        segmented_property_category=coded(segment.category),
        segmented_property_type=coded(segment.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm_identification(content),
        tracking_uid=content.tracking_uid(segment),
        tracking_id=content.tracking_identifier(segment),
        display_color=CIELabColor.from_rgb(*segment.colour),
    )
    laterality = side(segment)
    if laterality is not None:
        property_type = description.SegmentedPropertyTypeCodeSequence[0]
        property_type.SegmentedPropertyTypeModifierCodeSequence = [CodedConcept.from_code(laterality)]
    return description


def restore_references(dataset: Dataset, content: ResultContent) -> None:
    """Replace the stand-ins by the source objects, frame numbers included, and name every source instance."""
    done: set[int] = set()  # highdicom shares one item between the segments of a plane
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        item = frame.DerivationImageSequence[0].SourceImageSequence[0]
        if id(item) in done:
            continue
        done.add(id(item))
        source = content.frames[_plane(frame)]
        item.ReferencedSOPClassUID = source.sop_class_uid
        item.ReferencedSOPInstanceUID = source.sop_instance_uid
        if source.frame_number is not None:
            item.ReferencedFrameNumber = source.frame_number
    dataset.SourceImageSequence = DicomSequence(instance_references(content))
    series = Dataset()
    series.SeriesInstanceUID = content.identity.series_instance_uid
    series.ReferencedInstanceSequence = DicomSequence(instance_references(content))
    dataset.ReferencedSeriesSequence = DicomSequence([series])


def _fix_dimension_uid(dataset: Dataset, uid: str) -> None:
    """highdicom draws the Dimension Organization UID at random."""
    for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid


def _refer_to_superseded(dataset: Dataset, superseded: ObjectReference) -> None:
    """Names the earlier object for people (Derivation Description) and for programs (Referenced Image Sequence)."""
    dataset.DerivationDescription = f"Supersedes SOP Instance {superseded.sop_instance_uid}"
    image = Dataset()
    image.ReferencedSOPClassUID = superseded.sop_class_uid
    image.ReferencedSOPInstanceUID = superseded.sop_instance_uid
    image.PurposeOfReferenceCodeSequence = DicomSequence([code_item(_SUPERSEDED)])
    dataset.ReferencedImageSequence = DicomSequence([image])
    instance = Dataset()
    instance.ReferencedSOPClassUID = superseded.sop_class_uid
    instance.ReferencedSOPInstanceUID = superseded.sop_instance_uid
    series = Dataset()
    series.SeriesInstanceUID = superseded.series_instance_uid
    series.ReferencedInstanceSequence = DicomSequence([instance])
    dataset.ReferencedSeriesSequence.append(series)
