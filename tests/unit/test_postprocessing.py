from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.errors import BundleInvalid
from engine.postprocessing import KeepLargest, apply_postprocessing, read_postprocessing

NAME = "remove_all_but_largest_component_from_segmentation"


def document(*kwargs: Any, function: Any = NAME) -> dict[str, Any]:
    return {"postprocessing_fns": [function] * len(kwargs), "postprocessing_kwargs": list(kwargs)}


def test_the_largest_component_of_the_union_is_kept() -> None:
    labels = np.zeros((3, 6, 6), dtype=np.uint8)
    labels[1, 0, 0:2], labels[1, 1, 2] = 1, 2  # 3 voxels, joined by a corner
    labels[2, 5, 4:6] = 2  # 2 voxels
    labels[0, 5, 0] = 3  # not in the union
    apply_postprocessing(labels, read_postprocessing(document({"labels_or_regions": [1, 2]})))
    assert np.argwhere(labels == 2).tolist() == [[1, 1, 2]]
    assert int((labels == 1).sum()) == 2
    assert labels[0, 5, 0] == 3


def test_steps_run_in_order_and_components_that_tie_are_all_kept() -> None:
    labels = np.array([1, 1, 0, 1, 0, 2, 0, 2], dtype=np.uint8).reshape(1, 1, 8)
    apply_postprocessing(labels, read_postprocessing(document({"labels_or_regions": 1}, {"labels_or_regions": 2})))
    assert labels.ravel().tolist() == [1, 1, 0, 0, 0, 2, 0, 2]


def test_regions_are_flattened_and_a_background_is_honoured() -> None:
    steps = read_postprocessing(document({"labels_or_regions": [[1, 2], 3], "background_label": 4}))
    assert steps == (KeepLargest(values=(1, 2, 3), background=4),)
    labels = np.array([1, 2, 3, 0, 3], dtype=np.uint8).reshape(1, 1, 5)
    apply_postprocessing(labels, steps)
    assert labels.ravel().tolist() == [1, 2, 3, 0, 4]


def test_nothing_to_do_is_no_step_and_an_empty_map_stays_empty() -> None:
    assert read_postprocessing(None) == ()
    assert read_postprocessing(document()) == ()
    labels = np.zeros((2, 2, 2), dtype=np.uint8)
    apply_postprocessing(labels, [KeepLargest(values=(1,))])
    assert not labels.any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (document({"labels_or_regions": 1}, function="os.system"), "unknown"),
        (document({"labels_or_regions": 1, "run": "x"}), "known arguments"),
        (document({"labels_or_regions": "1"}), "no label value"),
        (document({"labels_or_regions": []}), "names no label"),
        (document({"labels_or_regions": True}), "no label value"),
        (document({"labels_or_regions": -1}), "no label value"),
        (document("labels"), "known arguments"),
        ({"postprocessing_fns": [NAME], "postprocessing_kwargs": []}, "alike long"),
        ({"postprocessing_fns": NAME, "postprocessing_kwargs": {}}, "alike long"),
        ({}, "alike long"),
    ],
)
def test_what_is_not_on_the_list_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleInvalid, match=message):
        read_postprocessing(wrong)


@pytest.mark.requirement("ART-12")
def test_the_k_largest_components_are_kept_with_those_that_are_as_large_as_the_last() -> None:
    row = [1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0]
    (step,) = read_postprocessing(document({"labels_or_regions": 1, "count": 2}, function="keep_largest_components"))
    labels = np.array(row, dtype=np.uint8).reshape(1, 1, 12)
    apply_postprocessing(labels, [step])
    assert labels.ravel().tolist() == [1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0]
    few = np.array([1, 0, 1], dtype=np.uint8).reshape(1, 1, 3)
    apply_postprocessing(few, [step])
    assert few.ravel().tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("function", "count"), [(NAME, 2), ("keep_largest_components", 0), ("keep_largest_components", True)]
)
def test_a_count_that_is_none_or_not_nnunets_is_refused(function: str, count: object) -> None:
    with pytest.raises(BundleInvalid, match=r"count|known arguments"):
        read_postprocessing(document({"labels_or_regions": 1, "count": count}, function=function))
