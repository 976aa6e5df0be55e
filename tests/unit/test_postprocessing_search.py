"""Which components are removed is decided by the mean Dice over all cases, by nnU-Net's rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.evaluation import Pair
from engine.labels import LabelManager
from engine.nifti import read_label_map
from engine.postprocessing import KeepLargest, read_postprocessing
from engine.postprocessing_search import (
    Postprocessing,
    apply_to_folder,
    find_postprocessing,
    write_postprocessing,
)
from tests.support.raw_datasets import write_array

LABELS = LabelManager.from_dataset_json({"labels": {"background": 0, "organ": 1, "tumour": 2}})
REGIONS = LabelManager.from_dataset_json(
    {"labels": {"background": 0, "whole": [1, 2], "tumour": 2}, "regions_class_order": [1, 2]}
)


def _row(*text: str) -> NDArray[np.uint8]:
    """A label map of one line of voxels; "." is background."""
    return np.array([[[0 if c == "." else int(c) for c in "".join(text)]]], dtype=np.uint8)


def _pairs(folder: Path, *rows: tuple[str, str]) -> list[Pair]:
    """Pairs of (reference, prediction)."""
    pairs = []
    for index, (reference, prediction) in enumerate(rows):
        paths = [folder / kind / f"case_{index}.nii.gz" for kind in ("reference", "prediction")]
        for path, text in zip(paths, (reference, prediction), strict=True):
            path.parent.mkdir(exist_ok=True)
            write_array(path, _row(text))
        pairs.append(Pair(name=f"case_{index}", reference=paths[0], prediction=paths[1]))
    return pairs


def _find(pairs: list[Pair], labels: LabelManager = LABELS, most: int = 1) -> Postprocessing:
    return find_postprocessing(pairs, labels, most_components=most, processes=1)


@pytest.mark.requirement("ART-12")
def test_specks_of_all_foreground_are_removed_where_the_mean_gets_better_and_no_label_worse(tmp_path: Path) -> None:
    found = _find(_pairs(tmp_path, ("1112........", "1112....1...")))
    assert found.steps == (KeepLargest(values=(1, 2)),)
    assert found.before["mean"]["1"]["Dice"] == pytest.approx(6 / 7)
    assert found.after["mean"]["1"]["Dice"] == 1


def test_what_makes_one_label_worse_is_not_done_to_all_and_then_tried_label_by_label(tmp_path: Path) -> None:
    # The tumour lies apart from the organ: keeping the largest of both would lose it.
    found = _find(_pairs(tmp_path, ("1111...22...", "1111.1.22.2.")))
    assert found.steps == (KeepLargest(values=(1,)), KeepLargest(values=(2,)))
    assert found.after["foreground_mean"]["Dice"] == 1


def test_a_step_that_changes_nothing_is_not_done(tmp_path: Path) -> None:
    assert _find(_pairs(tmp_path, ("111..22...", "11...22..."))).steps == ()


def test_the_mean_over_cases_decides(tmp_path: Path) -> None:
    helps, hurts = ("111.......", "111....1.."), ("111.111...", "111.11....")
    assert _find(_pairs(tmp_path, helps, hurts)).steps == ()


@pytest.mark.requirement("ART-12")
def test_the_best_number_of_components_is_searched_where_that_is_wanted(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, ("1111.111..2..", "1111.111.12.1"), ("111.11...2..", "111.11..12.1"))
    assert _find(pairs).steps == ()
    found = _find(pairs, most=3)
    assert found.steps[-1] == KeepLargest(values=(1,), count=2)
    assert found.after["foreground_mean"]["Dice"] == 1


@pytest.mark.requirement("ART-12")
def test_the_file_is_nnunets_and_is_read_back(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, ("1111...22...", "1111.1.22.2."), ("............", "............"))
    found = _find(pairs)
    write_postprocessing(found, LABELS, tmp_path / "postprocessing.json")
    document: dict[str, Any] = json.loads((tmp_path / "postprocessing.json").read_text())
    assert set(document) == {"input_folder", "postprocessed", "postprocessing_fns", "postprocessing_kwargs"}
    assert document["postprocessing_fns"] == ["remove_all_but_largest_component_from_segmentation"] * 2
    assert document["postprocessing_kwargs"] == [{"labels_or_regions": 1}, {"labels_or_regions": 2}]
    assert read_postprocessing(document) == found.steps
    assert document["postprocessed"]["foreground_mean"]["Dice"] == 1


def test_regions_are_written_as_lists(tmp_path: Path) -> None:
    found = _find(_pairs(tmp_path, ("1122........", "1122..1.....")), REGIONS)
    assert found.steps == (KeepLargest(values=(1, 2)),)
    write_postprocessing(found, REGIONS, tmp_path / "postprocessing.json")
    (kwargs,) = json.loads((tmp_path / "postprocessing.json").read_text())["postprocessing_kwargs"]
    assert kwargs["labels_or_regions"] in ([1, 2], [[1, 2], [2]])


def test_steps_are_applied_to_a_folder_with_its_summary(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, ("1112........", "1112....1..."))
    steps = (KeepLargest(values=(1, 2)),)
    summary = apply_to_folder(pairs, steps, LABELS, tmp_path / "postprocessed", processes=1)
    assert summary["mean"]["1"]["Dice"] == 1
    assert summary["mean"]["1"]["HD95"] == 0
    made = read_label_map(tmp_path / "postprocessed" / "case_0.nii.gz")
    assert np.array_equal(made.array, _row("1112........"))
    assert np.array_equal(read_label_map(pairs[0].prediction).array, _row("1112....1..."))
