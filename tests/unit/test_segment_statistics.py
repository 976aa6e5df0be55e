from __future__ import annotations

import numpy as np
import pytest

from engine.manifest import Code, LabelSpec
from engine.segment_statistics import mean_probabilities, measure_segments
from engine.uncertainty import Agreement
from engine.volume import Geometry, LabelMap, Volume

CODE = Code(scheme="SCT", value="123037004", meaning="Anatomical Structure")


def spec(value: int, name: str, *region: int) -> LabelSpec:
    return LabelSpec(
        value=value,
        name=name,
        region=region or (value,),
        category=CODE,
        type=CODE,
        laterality=None,
        pair=None,
        colour=(1, 2, 3),
        volume_range_ml=None,
    )


GRID = Geometry(shape=(4, 6, 8), affine_lps=np.diag([1.0, 2.0, 5.0, 1.0]))


def scene() -> tuple[Volume, LabelMap]:
    """Label 1: 2 + 1 voxels apart, one at the first slice; label 2: one voxel at the last column; label 3: none."""
    labels = np.zeros((4, 6, 8), dtype=np.uint8)
    labels[1, 2, 2:4] = 1
    labels[0, 4, 5] = 1
    labels[2, 2, 7] = 2
    image = np.zeros((2, 4, 6, 8), dtype=np.float32)
    image[0][labels == 1] = (7, 10, 13)
    image[0][labels == 2] = 100
    image[1] = -1
    return Volume(array=image, geometry=GRID), LabelMap(array=labels, geometry=GRID)


def test_each_segment_is_measured_on_the_source_grid() -> None:
    volume, labels = scene()
    one, two, none = measure_segments(
        volume, labels, [spec(1, "one"), spec(2, "two"), spec(3, "none")], confidences={1: 0.9, 2: 0.8, 3: None}
    )
    assert (one.voxels, one.components, one.confidence) == (3, 2, 0.9)
    assert one.volume_ml == pytest.approx(3 * 10 / 1000)
    assert one.mean_intensity == pytest.approx((10, -1))
    assert one.touches_border == ("z-first",)
    assert (two.voxels, two.components, two.touches_border) == (1, 1, ("x-last",))
    assert (none.voxels, none.volume_ml, none.components, none.touches_border) == (0, 0.0, 0, ())
    assert none.confidence is None
    assert none.mean_intensity is None


def test_a_region_holds_the_voxels_of_all_its_labels() -> None:
    volume, labels = scene()
    (whole,) = measure_segments(volume, labels, [spec(1, "whole", 1, 2)], confidences={1: 0.7})
    assert whole.voxels == 4
    assert whole.components == 3
    assert whole.mean_intensity == pytest.approx(((7 + 10 + 13 + 100) / 4, -1))
    assert whole.touches_border == ("z-first", "x-last")


def test_components_that_touch_by_a_corner_are_one() -> None:
    labels = np.zeros((3, 3, 3), dtype=np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = labels[2, 2, 2] = 1
    grid = Geometry(shape=(3, 3, 3), affine_lps=np.eye(4))
    (segment,) = measure_segments(
        Volume(array=np.zeros((1, 3, 3, 3), dtype=np.float32), geometry=grid),
        LabelMap(array=labels, geometry=grid),
        [spec(1, "one")],
        confidences={},
    )
    assert segment.components == 1
    assert segment.touches_border == ("z-first", "z-last", "y-first", "y-last", "x-first", "x-last")


def test_an_axis_of_one_voxel_has_no_border() -> None:
    grid = Geometry(shape=(1, 3, 3), affine_lps=np.eye(4))
    labels = np.zeros((1, 3, 3), dtype=np.uint8)
    labels[0, 1, 1] = 1
    (segment,) = measure_segments(
        Volume(array=np.zeros((1, 1, 3, 3), dtype=np.float32), geometry=grid),
        LabelMap(array=labels, geometry=grid),
        [spec(1, "one")],
        confidences={},
    )
    assert segment.touches_border == ()


def test_agreement_is_reported_per_segment() -> None:
    volume, labels = scene()
    table = Agreement(3)
    table.count(np.array([1, 1, 2], dtype=np.uint8), np.array([1, 0, 2], dtype=np.uint8))
    one, two = measure_segments(
        volume, labels, [spec(1, "one"), spec(2, "two")], confidences={}, fold_tables=[table], mirror_tables=[table]
    )
    assert one.fold_dice == one.mirror_dice == pytest.approx(2 / 3)
    assert two.fold_dice == 1.0
    assert one.border_entropy is None


def test_the_entropy_at_the_border_is_the_mean_of_the_networks() -> None:
    volume, labels = scene()
    specs = [spec(1, "one"), spec(2, "two")]
    one, two = measure_segments(volume, labels, specs, confidences={}, border_entropies=[{1: 0.1}, {1: 0.3}])
    assert one.border_entropy == pytest.approx(0.2)
    assert two.border_entropy is None
    one, two = measure_segments(volume, labels, specs, confidences={}, dilated_entropies=[{1: 0.2}, {1: 0.4}, {}])
    assert one.dilated_entropy == pytest.approx(0.3)
    assert (one.border_entropy, two.dilated_entropy) == (None, None)


def test_mean_probability_of_labels_and_of_regions() -> None:
    labels = np.array([0, 1, 1, 2], dtype=np.uint8).reshape(1, 1, 4)
    winner = np.array([0, 0.5, 0.75, 1.0], dtype=np.float16).reshape(1, 1, 1, 4)
    assert mean_probabilities(labels, winner, [spec(1, "a"), spec(2, "b"), spec(3, "c")]) == {1: 0.625, 2: 1.0, 3: None}
    each = np.array([[0, 0.5, 0.75, 1.0], [0, 0, 0, 0.25]], dtype=np.float16).reshape(2, 1, 1, 4)
    assert mean_probabilities(labels, each, [spec(1, "whole", 1, 2), spec(2, "core", 2)]) == {1: 0.75, 2: 0.25}
