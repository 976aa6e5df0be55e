"""The fallback for a PACS that refuses Segmentations: valid, burnt in, made of the source series alone."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from gateway.errors import Rejected
from gateway.results import secondary_capture
from gateway.results.content import ResultContent
from gateway.results.secondary_capture import SECONDARY_CAPTURE_STORAGE, encode_secondary_capture
from gateway.results.segmentation import encode_segmentation
from gateway.results.series import SeriesPart
from tests.conformance.test_segmentation import STRAIGHT, TILTED, hippocampus_crop
from tests.support.phantoms import LEFT, RIGHT, write_series
from tests.support.result_contents import content_of, part_of
from tests.support.result_readers import iod_errors


def phantom(folder: Path, recipe: dict[str, Any]) -> tuple[SeriesPart, ResultContent, NDArray[np.float32]]:
    series = write_series(folder / "source", **recipe)
    part = part_of(series.files)
    assert part.volume is not None
    return part, content_of(part, series.labels), part.volume.array[0]


@pytest.mark.peer("dciodvfy")
@pytest.mark.parametrize("recipe", [*STRAIGHT.values(), TILTED], ids=[*STRAIGHT, "tilted"])
def test_dciodvfy_finds_no_error(tmp_path: Path, recipe: dict[str, Any]) -> None:
    _, content, image = phantom(tmp_path, recipe)
    path = tmp_path / "capture.dcm"
    path.write_bytes(encode_secondary_capture(content, image).data)
    assert iod_errors(path) == []


@pytest.mark.requirement("OUT-44", open="RTSTRUCT, GSPS, PDF")
def test_only_affected_slices_are_shown_and_named(tmp_path: Path) -> None:
    part, content, image = phantom(tmp_path, {})
    made = encode_secondary_capture(content, image)
    dataset = pydicom.dcmread(BytesIO(made.data))
    affected = np.nonzero(content.labels.any(axis=(1, 2)))[0]
    assert made.sop_class_uid == dataset.SOPClassUID == SECONDARY_CAPTURE_STORAGE
    assert list(dataset.PageNumberVector) == [z + 1 for z in affected]
    assert [i.ReferencedSOPInstanceUID for i in dataset.SourceImageSequence] == [
        part.frames[z].sop_instance_uid for z in affected
    ]
    assert dataset.BurnedInAnnotation == "YES"
    assert "AI, not reviewed" in dataset.SeriesDescription
    assert "Not for diagnosis" in dataset.DerivationDescription
    assert dataset.SeriesNumber == 9012


@pytest.mark.requirement("OUT-41", open="SEMIAUTOMATIC and MANUAL after an edit")
def test_tracking_is_shared_with_the_segmentation(tmp_path: Path) -> None:
    _, content, image = phantom(tmp_path, {})
    capture = pydicom.dcmread(BytesIO(encode_secondary_capture(content, image).data))
    segmentation = pydicom.dcmread(BytesIO(encode_segmentation(content).data))
    tracked = [[(i.SegmentNumber, i.TrackingUID) for i in d.SegmentSequence] for d in (capture, segmentation)]
    assert tracked[0] == tracked[1]


def test_segments_are_drawn_where_they_are(tmp_path: Path) -> None:
    """Left is red and on the right of an axial picture; right is blue and on the left."""
    _, content, image = phantom(tmp_path, {})
    frames = pydicom.dcmread(BytesIO(encode_secondary_capture(content, image).data)).pixel_array
    frame = frames[len(frames) // 2].astype(int)
    height = int(frame.shape[0] * 0.75)  # the legend has the same colours
    outline = {n: np.abs(frame[:height] - content.segments[n - 1].colour).max(axis=-1) == 0 for n in (LEFT, RIGHT)}
    assert np.nonzero(outline[LEFT])[1].mean() > frame.shape[1] / 3 > np.nonzero(outline[RIGHT])[1].mean()


@pytest.mark.requirement("QUE-27")
def test_the_same_content_makes_the_same_bytes(tmp_path: Path) -> None:
    _, content, image = phantom(tmp_path, {"enhanced": True})
    assert encode_secondary_capture(content, image).data == encode_secondary_capture(content, image).data


@pytest.mark.peer("dciodvfy")
def test_an_empty_result_shows_the_middle_slice(tmp_path: Path) -> None:
    part, content, image = phantom(tmp_path, {})
    empty = content_of(part, np.zeros_like(content.labels))
    path = tmp_path / "capture.dcm"
    path.write_bytes(encode_secondary_capture(empty, image).data)
    assert iod_errors(path) == []
    assert pydicom.dcmread(path).NumberOfFrames == 1


def test_an_image_of_another_grid_is_refused(tmp_path: Path) -> None:
    _, content, image = phantom(tmp_path, {})
    with pytest.raises(Rejected, match="not on one grid"):
        encode_secondary_capture(content, image[1:])


def test_many_slices_are_thinned_out_and_the_object_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, content, image = phantom(tmp_path, {})
    whole = pydicom.dcmread(BytesIO(encode_secondary_capture(content, image).data))
    monkeypatch.setattr(secondary_capture, "_MAX_PIXEL_BYTES", len(whole.PixelData) // 2)
    thinned = pydicom.dcmread(BytesIO(encode_secondary_capture(content, image).data))
    assert list(thinned.PageNumberVector) == list(whole.PageNumberVector)[::2]
    assert len(thinned.PixelData) <= len(whole.PixelData) // 2
    assert "1 in 2 of them shown" in thinned.DerivationDescription


@pytest.mark.peer("dciodvfy", "shared-data")
def test_the_real_hippocampus_series_is_drawn_alone(tmp_path: Path, shared_data: Path) -> None:
    part = part_of(hippocampus_crop(shared_data / "dicom" / "mr-hippocampus" / "study3"))
    assert part.volume is not None
    labels = np.zeros(part.geometry.shape, dtype=np.uint8)
    labels[10:20, 10:20, 10:20] = LEFT
    path = tmp_path / "capture.dcm"
    path.write_bytes(encode_secondary_capture(content_of(part, labels), part.volume.array[0]).data)
    assert iod_errors(path) == []
    sources = {f.sop_instance_uid for f in part.frames}
    dataset = pydicom.dcmread(path)
    assert {i.ReferencedSOPInstanceUID for i in dataset.SourceImageSequence} <= sources
    assert [s.SeriesInstanceUID for s in dataset.ReferencedSeriesSequence] == [part.series_instance_uid]
