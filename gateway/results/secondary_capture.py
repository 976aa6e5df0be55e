"""Fallback for a PACS that refuses Segmentations: the overlay as Multi-frame True Color Secondary Capture (OUT-44).

Frames are the affected slices of the source series with the segments drawn in; nothing else of the study is touched.
Numbers cannot be read back from it: the Segment Sequence (a standard extension) carries codes and tracking UIDs, and
the report carries the volumes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, MultiFrameTrueColorSecondaryCaptureImageStorage

from gateway.errors import Rejected
from gateway.results.content import EncodedObject, ResultContent
from gateway.results.overlay import WARNING_TEXT, add_legend, intensity_window, slice_picture
from gateway.results.result_modules import ResultHeader, code_item, finished, instance_references, write_common_modules
from gateway.results.segmentation import segment_item

SECONDARY_CAPTURE_STORAGE = str(MultiFrameTrueColorSecondaryCaptureImageStorage)
_MAX_PIXEL_BYTES = 96 << 20
"""Uncompressed pixel data above this is thinned out: every k-th affected slice, and the object says so."""
_PAGE_NUMBER_VECTOR = 0x00182001


def encode_secondary_capture(content: ResultContent, image: NDArray[np.floating[Any]]) -> EncodedObject:
    """The overlay as secondary capture, Explicit VR Little Endian. image: (Z, Y, X) of the source series.

    The same content and image give the same bytes. Raises Rejected when image and labels are not on one grid.
    """
    if image.shape != content.labels.shape:
        raise Rejected(
            f"series {content.identity.series_instance_uid}: image {image.shape} and labels {content.labels.shape} "
            "are not on one grid; read the series again"
        )
    header = ResultHeader(content)
    affected = [int(z) for z in np.nonzero(content.labels.any(axis=(1, 2)))[0]] or [len(content.frames) // 2]
    window = intensity_window(image)
    first = _frame(content, image, affected[0], window)
    step = -(-len(affected) * first.nbytes // _MAX_PIXEL_BYTES)
    shown = affected[::step]
    frames = [first, *(_frame(content, image, z, window) for z in shown[1:])]

    dataset = Dataset()
    dataset.SOPClassUID = SECONDARY_CAPTURE_STORAGE
    dataset.Modality = "OT"
    dataset.ConversionType = "WSD"
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    dataset.BurnedInAnnotation = "YES"
    dataset.LossyImageCompression = "00"
    dataset.PatientOrientation = None  # frames carry letters; a legend lies below the image
    dataset.ImageComments = WARNING_TEXT
    dataset.DerivationDescription = _derivation(content, len(affected), step)
    dataset.DerivationCodeSequence = DicomSequence([code_item(codes.DCM.Segmentation)])
    dataset.SourceImageSequence = DicomSequence(_shown_references(content, shown))
    series = Dataset()
    series.SeriesInstanceUID = content.identity.series_instance_uid
    series.ReferencedInstanceSequence = DicomSequence(instance_references(content))
    dataset.ReferencedSeriesSequence = DicomSequence([series])
    dataset.SegmentSequence = DicomSequence([segment_item(content, s) for s in content.segments])
    dataset.SamplesPerPixel = 3
    dataset.PhotometricInterpretation = "RGB"
    dataset.PlanarConfiguration = 0
    dataset.Rows, dataset.Columns = first.shape[:2]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelRepresentation = 0
    dataset.NumberOfFrames = len(frames)
    if len(frames) > 1:
        dataset.FrameIncrementPointer = _PAGE_NUMBER_VECTOR
        dataset.PageNumberVector = [z + 1 for z in shown]
    pixels = b"".join(frame.tobytes() for frame in frames)
    dataset.PixelData = pixels + b"\0" * (len(pixels) % 2)
    dataset["PixelData"].VR = "OB"
    write_common_modules(dataset, header, role="SC", encoding="SC")
    return finished(dataset, header, role="SC", encoding="SC", transfer_syntax_uid=str(ExplicitVRLittleEndian))


def _frame(
    content: ResultContent, image: NDArray[np.floating[Any]], z: int, window: tuple[float, float]
) -> NDArray[np.uint8]:
    return np.asarray(add_legend(slice_picture(content, image, z, window), content), dtype=np.uint8)


def _derivation(content: ResultContent, affected: int, step: int) -> str:
    model = content.identity.model
    text = f"Overlay of {model.name} {model.version} on the {affected} affected slices of the source series"
    if step > 1:
        text += f", 1 in {step} of them shown"
    if content.supersedes.image is not None:
        text += f"; supersedes the result of SOP Instance {content.supersedes.image.sop_instance_uid}"
    return f"{text}. {WARNING_TEXT}"


def _shown_references(content: ResultContent, shown: list[int]) -> list[Dataset]:
    """One item per frame, in the order of the frames."""
    items = []
    for z in shown:
        source = content.frames[z]
        item = Dataset()
        item.ReferencedSOPClassUID = source.sop_class_uid
        item.ReferencedSOPInstanceUID = source.sop_instance_uid
        if source.frame_number is not None:
            item.ReferencedFrameNumber = source.frame_number
        item.PurposeOfReferenceCodeSequence = DicomSequence(
            [code_item(codes.DCM.SourceImageForImageProcessingOperation)]
        )
        items.append(item)
    return items
