"""engine.labels: what heads mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.errors import ImportRefused
from engine.labels import LabelManager


def manager(labels: dict[str, Any], order: list[int] | None = None) -> LabelManager:
    document: dict[str, Any] = {"labels": labels}
    if order is not None:
        document["regions_class_order"] = order
    return LabelManager.from_dataset_json(document)


def test_plain_labels_have_a_head_for_background_and_none_for_ignore() -> None:
    labels = manager({"background": 0, "spleen": 2, "liver": 1, "ignore": 3})
    assert labels.num_heads == 3
    assert labels.ignore_label == 3
    assert labels.foreground_labels == (1, 2)
    assert [label.name for label in labels.foreground] == ["spleen", "liver"]
    assert not labels.has_regions


def test_plain_argmax_takes_the_lowest_index_in_a_tie() -> None:
    logits = np.array([[[[1.0, 0.0, 2.0]]], [[[1.0, 3.0, 2.0]]], [[[0.0, 3.0, 2.0]]]], dtype=np.float32)
    labels = manager({"background": 0, "a": 1, "b": 2}).logits_to_labels(logits)
    assert labels.tolist() == [[[0, 1, 0]]]
    assert labels.dtype == np.uint8


def test_regions_are_written_in_class_order_and_later_ones_win() -> None:
    labels = manager({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "active": [3]}, [1, 2, 3])
    assert labels.num_heads == 3
    logits = np.array([[[[1.0, 1.0, 1.0, -1.0]]], [[[-1.0, 1.0, 1.0, 0.0]]], [[[-1.0, -1.0, 1.0, -1.0]]]])
    assert labels.logits_to_labels(logits.astype(np.float32)).tolist() == [[[1, 2, 3, 0]]]


def test_regions_follow_the_order_of_declaration_not_of_values() -> None:
    labels = manager({"background": 0, "core": [2], "whole": [1, 2]}, [2, 1])
    assert [(label.name, label.value) for label in labels.foreground] == [("core", 2), ("whole", 1)]
    both = np.ones((2, 1, 1, 1), dtype=np.float32)
    assert labels.logits_to_labels(both).item() == 1


def test_ignore_with_regions_has_no_head_and_no_place_in_the_class_order() -> None:
    labels = manager({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2])
    assert labels.num_heads == 2
    assert labels.values == (0, 1, 2)


def test_probabilities_sum_to_one_over_labels_and_are_independent_over_regions() -> None:
    logits = np.array([[[[1000.0]]], [[[999.0]]]], dtype=np.float16)
    plain = manager({"background": 0, "a": 1}).probabilities(logits)
    assert plain.dtype == np.float32
    assert plain.sum(axis=0).item() == pytest.approx(1.0)
    assert plain[0].item() == pytest.approx(1 / (1 + np.exp(-1.0)), rel=1e-6)
    regions = manager({"background": 0, "whole": [1, 2], "core": [2]}, [1, 2])
    sided = np.array([[[[-800.0, 0.0]]], [[[800.0, 0.0]]]], dtype=np.float32)
    assert regions.probabilities(sided)[:, 0, 0].tolist() == [[0.0, 0.5], [1.0, 0.5]]


def test_many_labels_need_sixteen_bits_from_255_on() -> None:
    names: dict[str, Any] = {"background": 0}
    assert manager({**names, **{f"l{i}": i for i in range(1, 255)}}).dtype is np.uint8
    assert manager({**names, **{f"l{i}": i for i in range(1, 256)}}).dtype is np.uint16


def test_wrong_number_of_heads_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 heads where the labels need 3"):
        manager({"background": 0, "a": 1, "b": 2}).logits_to_labels(np.zeros((2, 1, 1, 1), dtype=np.float32))


@pytest.mark.parametrize(
    ("labels", "order", "named"),
    [
        ({"a": 1}, None, "background"),
        ({"background": 1, "a": 0}, None, "background"),
        ({"background": 0}, None, "no foreground"),
        ({"background": 0, "a": 2}, None, "gaps"),
        ({"background": 0, "a": 1, "b": 1}, None, "same value"),
        ({"background": 0, "a": 1, "ignore": 3}, None, "ignore"),
        ({"background": 0, "a": 1, "ignore": [2]}, None, "ignore"),
        ({"background": 0, "a": [1, 2]}, None, "regions_class_order"),
        ({"background": 0, "a": [1, 2], "b": [2]}, [1], "regions_class_order"),
        ({"background": 0, "a": -1}, None, "a"),
        ({"background": 0, "a": "1"}, None, "a"),
        ({"background": 0, "a": 10**40}, None, "a"),
        ({"background": 0, "a": True}, None, "a"),
    ],
)
def test_labels_that_break_the_rules_are_refused(labels: dict[str, Any], order: list[int] | None, named: str) -> None:
    with pytest.raises(ImportRefused, match=named):
        manager(labels, order)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([1], "1 values for 2 regions"),
        ([1, 2, 2], "3 values for 2 regions"),
        ([3, 2], "3 for region 'whole' is none of its values"),
        ([1, 1], "1 for region 'core' is none of its values"),
        ([0, 2], "0 for region 'whole' is none of its values"),
        ([2, 2], "2 is given twice"),
    ],
)
def test_each_region_is_written_as_a_value_of_its_own(order: list[int], message: str) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    with pytest.raises(ImportRefused, match=rf"dataset\.json.*regions_class_order.*{message}"):
        manager(labels, order)
