from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.labels import LabelManager
from engine.uncertainty import Agreement, MirrorAgreement, fold_agreements, lowest_dice, table_size

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
