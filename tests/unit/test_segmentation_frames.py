"""Segmentations made frame by frame equal those that highdicom makes from all voxels."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import RLELossless

from gateway.errors import Rejected
from gateway.results import segmentation
from gateway.results.content import Encoding, ResultContent
from gateway.results.segmentation import encode_segmentation
from gateway.results.segmentation_frames import label_values, rle_frame, segments_present
from tests.support.phantoms import LEFT, write_series
from tests.support.result_contents import content_of, part_of
from tests.support.whole_segmentation import whole_segmentation

ENCODINGS: tuple[Encoding, ...] = ("BINARY", "LABELMAP")
RECIPES: dict[str, dict[str, Any]] = {
    "axial": {},
    "reversed": {"order": "reversed", "instance_numbers": "against"},
    "double-oblique": {"orientation": "double-oblique"},
    "sagittal-mr": {"orientation": "sagittal", "modality": "MR"},
    "tilted": {"tilt_deg": 15.0},
    "single-slice": {"single_slice": True},
    "enhanced-ct": {"enhanced": True, "order": "shuffled"},
    "enhanced-mr-sagittal": {"enhanced": True, "modality": "MR", "orientation": "sagittal", "order": "reversed"},
    "frames-of-no-whole-bytes": {"shape": (9, 13, 15)},
}


def phantom(folder: Path, recipe: dict[str, Any]) -> ResultContent:
    series = write_series(folder / "source", **recipe)
    return content_of(part_of(series.files), series.labels)


def assert_equal(content: ResultContent, encoding: Encoding) -> pydicom.Dataset:
    """BINARY byte by byte; highdicom pads pixels of an odd length with the character 0, this program with a zero byte.
    LABELMAP, which is compressed here only: every element, then every pixel."""
    ours, whole = encode_segmentation(content, encoding=encoding).data, whole_segmentation(content, encoding).data
    made, expected = (pydicom.dcmread(BytesIO(data)) for data in (ours, whole))
    if encoding == "BINARY":
        if ours[-1] == 0 and whole[-1] == ord("0"):
            ours, whole = ours[:-1], whole[:-1]
        assert ours == whole
    else:
        assert np.array_equal(made.pixel_array, expected.pixel_array)
        del made.PixelData, expected.PixelData
        assert made.to_json_dict() == expected.to_json_dict()
    return made


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_geometry_gives_the_same_object(tmp_path: Path, recipe: dict[str, Any], encoding: Encoding) -> None:
    assert_equal(phantom(tmp_path, recipe), encoding)


def many_segments(content: ResultContent, count: int, seed: int) -> ResultContent:
    """Boxes of `count` labels, some of them nowhere, and slices without any."""
    draw = np.random.default_rng(seed)
    shape = content.geometry.shape
    labels: NDArray[Any] = np.zeros(shape, dtype=np.uint16 if count > 255 else np.uint8)
    for value in draw.permutation(np.arange(1, count + 1))[: count * 3 // 4]:
        z, y, x = (draw.integers(0, n - 3) for n in shape)
        labels[z : z + 3, y : y + 3, x : x + 3] = value
    labels[shape[0] // 2] = 0
    return _with_labels(content, labels, [(value,) for value in range(1, count + 1)])


def _with_labels(content: ResultContent, labels: NDArray[Any], regions: list[tuple[int, ...]]) -> ResultContent:
    first = content.segments[0]
    segments = tuple(
        replace(first, number=number, value=number, region=region, name=f"structure {number}")
        for number, region in enumerate(regions, start=1)
    )
    return replace(content, labels=labels, segments=segments)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("count", [1, 2, 12, 300])
def test_gaps_and_absent_segments_give_the_same_object(tmp_path: Path, count: int, encoding: Encoding) -> None:
    content = many_segments(phantom(tmp_path, {}), count, seed=count)
    dataset = assert_equal(content, encoding)
    assert len(dataset.SegmentSequence) == count + (encoding == "LABELMAP")
    assert not segments_present(content)[content.labels.shape[0] // 2].any()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_result_without_any_voxel_gives_the_same_object(tmp_path: Path, encoding: Encoding) -> None:
    content = phantom(tmp_path, {})
    assert_equal(replace(content, labels=np.zeros_like(content.labels)), encoding)


@pytest.mark.parametrize("shared", [True, False])
def test_overlapping_segments_give_the_same_object(tmp_path: Path, shared: bool) -> None:
    """Regions that share a label value overlap only where that value lies."""
    content = phantom(tmp_path, {})
    labels = content.labels if shared else np.where(content.labels == LEFT, content.labels, 0)
    dataset = assert_equal(_with_labels(content, labels, [(1, 2), (2,)]), "BINARY")
    assert dataset.SegmentsOverlap == ("YES" if shared else "NO")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_label_values_of_no_segment_are_background(tmp_path: Path, encoding: Encoding) -> None:
    content = phantom(tmp_path, {})
    labels = content.labels.copy()
    labels[0, 0, 0] = 9
    assert_equal(replace(content, labels=labels), encoding)


def test_the_file_can_be_written_twice(tmp_path: Path) -> None:
    made = encode_segmentation(many_segments(phantom(tmp_path, {}), 12, seed=1))
    assert b"".join(made.chunks()) == b"".join(made.chunks()) == made.data


def test_more_pixels_than_an_element_holds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "MOST_BYTES", 100)
    with pytest.raises(Rejected, match="write it as LABELMAP"):
        encode_segmentation(phantom(tmp_path, {}))


def test_every_label_value_of_a_slice_is_found() -> None:
    labels = np.random.default_rng(0).integers(0, 9, (5, 4, 4)).astype(np.uint8)
    labels[3] = 7  # one run only
    expected = [[bool((plane == value).any()) for value in range(labels.max() + 1)] for plane in labels]
    assert label_values(labels).tolist() == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (3, 128), (3, 129), (2, 700)])
def test_runs_of_every_length_are_decoded_to_what_they_were(shape: tuple[int, int], dtype: type) -> None:
    draw = np.random.default_rng(shape[1])
    values: NDArray[Any] = draw.integers(0, np.iinfo(dtype).max, 40).astype(dtype)
    numbers = np.repeat(values, draw.integers(1, 200, 40))[: shape[0] * shape[1]].copy()
    numbers = np.resize(numbers, shape)
    encoded = rle_frame(numbers)
    assert len(encoded) % 2 == 0
    options: dict[str, Any] = {
        "rows": shape[0],
        "columns": shape[1],
        "samples_per_pixel": 1,
        "bits_allocated": numbers.itemsize * 8,
        "bits_stored": numbers.itemsize * 8,
        "pixel_representation": 0,
        "number_of_frames": 1,
        "photometric_interpretation": "MONOCHROME2",
        "pixel_keyword": "PixelData",
    }
    for plugin in ("pylibjpeg", "pydicom"):
        decoded, _ = get_decoder(RLELossless).as_array(
            encapsulate([encoded]), index=0, decoding_plugin=plugin, **options
        )
        assert np.array_equal(decoded, numbers)
