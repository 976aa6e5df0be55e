from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.certainty_maps import CertaintyMaps
from engine.labels import LabelManager
from engine.logit_rows import LogitRows
from engine.uncertainty import (
    Agreement,
    MirrorAgreement,
    border_entropies,
    dilated_entropies,
    fold_agreements,
    lowest_dice,
    mean_entropy,
    table_size,
)

LABELS = LabelManager.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2}})


def labels_of(*values: int) -> NDArray[np.uint8]:
    return np.array(values, dtype=np.uint8)


def test_dice_of_a_label_and_of_a_region() -> None:
    table = Agreement(3)
    table.count(labels_of(0, 1, 1, 2, 2), labels_of(0, 1, 2, 2, 0))
    assert table.dice([1]) == pytest.approx(2 * 1 / (2 + 1))
    assert table.dice([2]) == pytest.approx(2 * 1 / (2 + 2))
    assert table.dice([1, 2]) == pytest.approx(2 * 3 / (4 + 3))


def test_a_label_in_neither_map_has_no_dice_and_in_one_map_a_dice_of_0() -> None:
    table = Agreement(3)
    table.count(labels_of(0, 1), labels_of(0, 0))
    assert table.dice([2]) is None
    assert table.dice([1]) == 0


def test_weights_count_and_are_shared_by_the_slices_of_a_window() -> None:
    table = Agreement(2)
    first, second = np.ones((2, 2), dtype=np.uint8), np.array([[1, 0], [1, 0]], dtype=np.uint8)
    table.count(first, second, np.array([3.0, 1.0], dtype=np.float32))
    assert table.dice([1]) == pytest.approx(2 * 6 / (8 + 6))


def test_the_lowest_pair_of_folds_counts() -> None:
    folds = [labels_of(1, 1, 1, 1), labels_of(1, 1, 1, 0), labels_of(1, 0, 0, 0)]
    tables = fold_agreements(folds, LABELS)
    assert len(tables) == 3
    assert lowest_dice(tables, [1]) == pytest.approx(2 * 1 / (4 + 1))
    assert lowest_dice(tables, [2]) is None
    assert lowest_dice((), [1]) is None
    assert fold_agreements(folds[:1], LABELS) == ()


def test_mirrored_passes_are_compared_window_by_window() -> None:
    observer = MirrorAgreement(LABELS)
    plain = np.zeros((3, 1, 1, 4), dtype=np.float32)
    plain[1, ..., :2] = 1
    mirrored = np.zeros_like(plain)
    mirrored[1, ..., :1] = 1
    for _ in range(2):
        observer(plain, mirrored, np.ones((1, 1, 4), dtype=np.float32))
    assert observer.agreement.dice([1]) == pytest.approx(2 * 1 / 3)


def test_a_table_has_room_for_the_highest_value_written() -> None:
    regions = LabelManager.from_dataset_json(
        {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    )
    assert table_size(LABELS) == table_size(regions) == 3


def entropy(probability: float) -> float:
    return float(-probability * np.log2(probability) - (1 - probability) * np.log2(1 - probability))


def cube(inside: float, border: float, outside: float) -> NDArray[np.float32]:
    """Logits (2, 7, 7, 7): of label 1 in the middle of its 3 x 3 x 3 voxels, on their surface, and elsewhere."""
    logits = np.full((2, 7, 7, 7), 0, dtype=np.float32)
    logits[1] = outside
    logits[1, 2:5, 2:5, 2:5] = border
    logits[1, 3, 3, 3] = inside
    return logits


ONE = LabelManager.from_dataset_json({"labels": {"background": 0, "a": 1}})


def maps_of(logits: NDArray[np.float32], labels: LabelManager) -> CertaintyMaps:
    heads, depth, height, width = logits.shape
    rows, maps = LogitRows(heads, depth, (height, width)), CertaintyMaps.empty((depth, height, width), labels)
    for z in range(depth):
        rows.put(z, logits[:, z])
        maps.judge(rows, labels, z, (0, height), (0, 0, 0))
    return maps


def near(value: float) -> Any:
    """Maps hold 16 bits."""
    return pytest.approx(value, abs=4e-5)


def found_in(logits: NDArray[np.float32], labels: LabelManager) -> dict[int, float]:
    return border_entropies(maps_of(logits, labels), labels)


def test_the_entropy_at_the_border_is_that_of_the_segment_s_own_outermost_voxels() -> None:
    expected = entropy(1 / (1 + np.exp(-1.5)))
    assert found_in(cube(9.0, 1.5, -0.1), ONE) == {1: near(expected)}
    assert found_in(cube(0.1, 1.5, -9.0), ONE) == {1: near(expected)}
    assert found_in(cube(9.0, 50.0, -9.0), ONE)[1] == near(0.0)


def test_the_edge_of_the_image_is_no_border() -> None:
    logits = cube(9.0, 1.5, -9.0)[:, 2:5, 2:5, 2:5]
    assert found_in(logits, ONE) == {}
    half = cube(9.0, 1.5, -9.0)[:, :4, 2:5, 2:5]
    half[:, 2] = cube(9.0, 0.5, -9.0)[:, 2, 2:5, 2:5]
    assert found_in(half, ONE) == {1: near(entropy(1 / (1 + np.exp(-0.5))))}


def test_two_labels_that_meet_have_a_border_there_and_an_absent_one_has_none() -> None:
    logits = np.zeros((3, 1, 1, 4), dtype=np.float32)
    logits[1, ..., :2], logits[2, ..., 2:] = (5.0, 1.0), (2.0, 5.0)
    each = {k: np.exp(v) / (np.exp(v) + 2) for k, v in ((1, 1.0), (2, 2.0))}
    assert found_in(logits, LABELS) == {k: near(entropy(p)) for k, p in each.items()}
    assert found_in(np.stack([logits[0], logits[1]]), ONE).keys() == {1}
    assert found_in(-logits[:2], ONE) == {}


def test_a_label_that_wins_with_less_than_one_half_is_wholly_unsure() -> None:
    logits = np.zeros((3, 1, 1, 2), dtype=np.float32)
    logits[1, ..., 0] = 0.1
    assert found_in(logits, LABELS) == {1: 1.0}


def test_regions_have_their_own_probability_and_what_another_region_took_over_counts_as_inside() -> None:
    regions = LabelManager.from_dataset_json(
        {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    )
    logits = np.full((2, 1, 1, 6), -5.0, dtype=np.float32)
    logits[0, ..., 1:5] = (1.0, 4.0, 4.0, 1.0)
    logits[1, ..., 2:4] = 2.0
    found = found_in(logits, regions)
    assert found == {
        1: near(entropy(1 / (1 + np.exp(-1.0)))),
        2: near(entropy(1 / (1 + np.exp(-2.0)))),
    }
    logits[0, ..., 1] = -1000.0
    logits[1, ..., 1] = 2.0  # in the whole by its core only: the whole's own head has no doubt that it is not there
    assert found_in(logits, regions)[1] == near((1.0 + entropy(1 / (1 + np.exp(-1.0)))) / 2)


def test_the_networks_that_have_a_segment_are_averaged() -> None:
    assert mean_entropy([{1: 0.2, 2: 0.5}, {1: 0.4}], 1) == pytest.approx(0.3)
    assert mean_entropy([{1: 0.2, 2: 0.5}, {1: 0.4}], 2) == 0.5
    assert mean_entropy([{1: 0.2}], 3) is None
    assert mean_entropy([], 1) is None


def dilated_in(logits: NDArray[np.float32], labels: LabelManager) -> dict[int, float]:
    return dilated_entropies(maps_of(logits, labels), labels)


def line(*of_label: float) -> NDArray[np.float32]:
    """Logits (2, 1, 1, X) of label 1 along a line; background has 0."""
    logits = np.zeros((2, 1, 1, len(of_label)), dtype=np.float32)
    logits[1, 0, 0] = of_label
    return logits


@pytest.mark.requirement("ART-21")
def test_the_dilated_entropy_is_the_mean_over_the_segment_and_two_voxels_around_it() -> None:
    """What lies farther away does not count, and a network that nearly went on beyond the border is seen."""
    far, doubt = (-0.01,) * 3, 1 / (1 + np.exp(-0.5))
    sharp = line(*far, -50.0, -50.0, 50.0, 50.0, -50.0, -50.0, *far)
    assert dilated_in(sharp, ONE)[1] == near(0.0)
    nearly = line(*far, -50.0, -0.5, 50.0, 50.0, -0.5, -50.0, *far)
    assert dilated_in(nearly, ONE) == {1: near(2 * entropy(doubt) / 6)}
    assert found_in(nearly, ONE)[1] == near(0.0)  # which the border's own voxels do not show


def test_a_large_segment_counts_no_more_than_a_small_one() -> None:
    """Means, not sums: equal doubt everywhere gives equal figures whatever the size."""
    logits = np.full((3, 12, 24, 24), -0.7, dtype=np.float32)
    logits[0] = 0.0
    logits[1, 2:10, 2:20, 2:20] = logits[2, 6:7, 22:23, 22:23] = 0.7
    found = dilated_in(logits, LABELS)
    assert found.keys() == {1, 2}
    assert abs(found[1] - found[2]) < 0.1


def test_regions_have_their_own_doubt() -> None:
    regions = LabelManager.from_dataset_json(
        {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    )
    logits = np.full((2, 1, 1, 8), -50.0, dtype=np.float32)
    logits[0, ..., 2:6] = 50.0
    logits[1, ..., 3:5] = 1.0
    assert dilated_in(logits, regions) == {
        1: near(0.0),
        2: near(2 * entropy(1 / (1 + np.exp(-1.0))) / 6),
    }


def test_a_segment_that_is_not_there_has_no_dilated_entropy() -> None:
    assert dilated_in(np.stack([np.ones((2, 2, 2)), *np.zeros((2, 2, 2, 2))]).astype(np.float32), LABELS) == {}


def test_of_a_large_segment_a_lattice_is_looked_at_and_specks_between_its_places_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(3)
    logits = np.stack([np.zeros((20, 30, 30)), rng.normal(2, 1, (20, 30, 30))]).astype(np.float32)
    exact = dilated_in(logits, ONE)
    specks = np.full((2, 41, 41, 41), 0.0, dtype=np.float32)
    specks[1] = -50.0
    specks[1, 0, 0, 0] = specks[1, 40, 40, 40] = 50.0
    specks[1, 20, 17, 23] = 50.0
    monkeypatch.setattr("engine.uncertainty._DILATED_PLACES", 2**9)
    assert dilated_in(logits, ONE)[1] == pytest.approx(exact[1], abs=0.03)
    monkeypatch.setattr("engine.uncertainty._DILATED_PLACES", 8)
    monkeypatch.setattr("engine.uncertainty._REACH", 0)
    specks[1, 0, 0, 0] = specks[1, 40, 40, 40] = -50.0
    specks[1, 1, 1, 1] = specks[1, 39, 39, 39] = 50.0
    assert dilated_in(specks, ONE)[1] == near(0.0)
