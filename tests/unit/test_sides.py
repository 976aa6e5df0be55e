"""Which labels are sides of each other, along which axis of the patch the images run from side to side, and what that
means for mirroring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.augmentation_profile import NNUNET, AugmentationPlan
from engine.dataset import RawDataset, open_dataset
from engine.errors import DatasetInvalid
from engine.plans import Configuration, Plans, read_plans
from engine.sides import Mirroring, MirrorPolicy, SidesPolicy, lateral_axes, paired_labels, plan_mirroring
from tests.support.raw_datasets import write_array, write_dataset

SIDED = {"background": 0, "kidney_left": 1, "kidney_right": 2}
# Columns are the directions of x, y, z: here x runs to the head, y to the left, z to the back.
STRAIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
MIRRORED = (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
Y_IS_LATERAL = (0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0)


def _dataset(folder: Path, directions: tuple[tuple[float, ...], ...] = (), **changes: Any) -> RawDataset:
    write_dataset(folder, cases=2, **({"labels": SIDED} | changes))
    for index, direction in enumerate(directions):
        image = np.ones((6, 10, 12), dtype=np.float32)
        write_array(folder / "imagesTr" / f"case_{index:02}_0000.nii.gz", image, direction=direction)
    return open_dataset(folder)


def _plans(forward: tuple[int, int, int] = (0, 1, 2), *, flat: bool = False) -> tuple[Plans, Configuration]:
    from tests.support.nnunet_results import TWO_D, TrainedModel, plans_json

    model = TWO_D if flat else TrainedModel()
    document = plans_json(model)
    document["transpose_forward"] = list(forward)
    document["transpose_backward"] = [forward.index(axis) for axis in range(3)]
    plans = read_plans(document)
    return plans, plans.configurations[model.name]


def _mirroring(dataset: RawDataset, policy: SidesPolicy = "keep", **plans: Any) -> Mirroring:
    return plan_mirroring(dataset, *_plans(**plans), policy)


def test_labels_without_sides_let_every_axis_be_mirrored(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path / "d", labels={"background": 0, "liver": 1, "spleen": 2})
    assert _mirroring(dataset) == Mirroring(axes=(0, 1, 2))


def test_the_lateral_axis_is_not_mirrored_where_labels_are_left_and_right(tmp_path: Path) -> None:
    found = _mirroring(_dataset(tmp_path / "d"))
    assert (found.axes, found.lateral_axis, found.paired_labels) == ((0, 1), None, ())
    assert found.note == "kidney_left and kidney_right are sides: axis 2 of the patch is not mirrored"


def test_the_lateral_axis_is_that_of_the_images_and_of_the_plans(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path / "d", (Y_IS_LATERAL, Y_IS_LATERAL))
    assert lateral_axes(dataset) == {1}
    assert _mirroring(dataset).axes == (0, 2)
    assert _mirroring(dataset, forward=(1, 0, 2)).axes == (1, 2)


def test_a_2d_patch_is_mirrored_freely_where_its_slices_are_stacked_from_side_to_side(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path / "d")
    assert _mirroring(dataset, flat=True).axes == (0,)
    assert _mirroring(dataset, flat=True, forward=(2, 0, 1)).axes == (0, 1)


@pytest.mark.parametrize("other", [MIRRORED, Y_IS_LATERAL, (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)])
@pytest.mark.parametrize("policy", ["keep", "swap"])
@pytest.mark.parametrize("mirror", ["all", "lateral", "none"])
def test_cases_whose_left_lies_elsewhere_in_the_array_are_refused_where_labels_are_sides(
    tmp_path: Path, other: tuple[float, ...], policy: SidesPolicy, mirror: MirrorPolicy
) -> None:
    dataset = _dataset(tmp_path / "d", (STRAIGHT, other))
    with pytest.raises(DatasetInvalid, match=r"case_00 is stored LPS and case_01 .*SimpleITKIOWithReorient"):
        plan_mirroring(dataset, *_plans(), policy, mirror)
    assert plan_mirroring(dataset, *_plans(), "ignore").axes == (0, 1, 2)


def test_cases_stored_differently_are_allowed_where_sides_lie_alike_or_do_not_matter(tmp_path: Path) -> None:
    front_to_back = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
    assert _mirroring(_dataset(tmp_path / "sides", (STRAIGHT, front_to_back))).axes == (0, 1)
    liver = _dataset(tmp_path / "liver", (STRAIGHT, MIRRORED), labels={"background": 0, "liver": 1})
    assert _mirroring(liver).axes == (0, 1, 2)
    reordered = {"overwrite_image_reader_writer": "SimpleITKIOWithReorient"}
    assert _mirroring(_dataset(tmp_path / "reordered", (STRAIGHT, MIRRORED), **reordered)).axes == (0, 1)


def test_an_oblique_image_lies_as_its_nearest_axes_do(tmp_path: Path) -> None:
    turned = (0.866, -0.5, 0.0, 0.5, 0.866, 0.0, 0.0, 0.0, 1.0)
    turned_mirrored = (-0.866, -0.5, 0.0, -0.5, 0.866, 0.0, 0.0, 0.0, 1.0)
    assert _mirroring(_dataset(tmp_path / "alike", (STRAIGHT, turned))).axes == (0, 1)
    with pytest.raises(DatasetInvalid, match=r"case_00 is stored LPS and case_01 RPS"):
        _mirroring(_dataset(tmp_path / "mirrored", (turned, turned_mirrored)))


def test_a_side_without_its_other_is_a_side_all_the_same(tmp_path: Path) -> None:
    """Mirrored, a left kidney would be looked for where the right one is."""
    labels = {"background": 0, "kidney_left": 1, "liver": 2}
    alone = _dataset(tmp_path / "d", labels=labels)
    found = _mirroring(alone)
    assert found.axes == (0, 1)
    assert found.note is not None
    assert found.note.startswith("kidney_left without its other side: axis 2 of the patch is not mirrored (`pairs`: []")
    with pytest.raises(DatasetInvalid, match="'kidney_left' is a side without its other"):
        _mirroring(alone, "swap")
    with pytest.raises(DatasetInvalid, match="left and right are not on the same side of the array"):
        _mirroring(_dataset(tmp_path / "mixed", (STRAIGHT, MIRRORED), labels=labels))
    stated = _dataset(tmp_path / "stated", labels=labels, pairs=[])
    assert _mirroring(stated) == Mirroring(axes=(0, 1, 2))
    assert _mirroring(alone, "ignore") == Mirroring(axes=(0, 1, 2))


def test_a_side_without_its_other_beside_a_pair_is_named_too(tmp_path: Path) -> None:
    labels = {"background": 0, "lung_left": 1, "lung_right": 2, "kidney_left": 3}
    note = _mirroring(_dataset(tmp_path / "d", labels=labels)).note
    assert note is not None
    assert note.startswith("lung_left and lung_right are sides; kidney_left without its other side: axis 2")


def test_a_reader_that_reorients_decides_the_axis(tmp_path: Path) -> None:
    changes = {"overwrite_image_reader_writer": "SimpleITKIOWithReorient"}
    assert _mirroring(_dataset(tmp_path / "d", (Y_IS_LATERAL,), **changes)).axes == (0, 1)


def test_labels_change_places_with_the_axis_where_that_is_wanted_and_predictions_are_not_mirrored_along_it(
    tmp_path: Path,
) -> None:
    found = _mirroring(_dataset(tmp_path / "d"), "swap")
    assert (found.axes, found.lateral_axis, found.paired_labels) == ((0, 1, 2), 2, ((1, 2),))
    plan = AugmentationPlan(
        profile=NNUNET,
        patch_size=(8, 8, 8),
        spacing_mm=(1.0, 1.0, 1.0),
        mirror_axes=found.axes,
        lateral_axis=found.lateral_axis,
        paired_labels=found.paired_labels,
    )
    assert plan.inference_mirror_axes == (0, 1)


def test_sides_can_be_ignored_as_in_nnunet(tmp_path: Path) -> None:
    assert _mirroring(_dataset(tmp_path / "d"), "ignore") == Mirroring(axes=(0, 1, 2))


def test_only_left_and_right_are_mirrored_where_that_is_wanted(tmp_path: Path) -> None:
    liver = _dataset(tmp_path / "liver", (Y_IS_LATERAL, Y_IS_LATERAL), labels={"background": 0, "liver": 1})
    found = plan_mirroring(liver, *_plans(forward=(1, 0, 2)), mirror="lateral")
    assert (found.axes, found.note) == ((0,), "mirrored along axis 0 of the patch alone")
    kidneys = _dataset(tmp_path / "kidneys")
    assert plan_mirroring(kidneys, *_plans(), mirror="lateral").axes == ()
    swapped = plan_mirroring(kidneys, *_plans(), "swap", "lateral")
    assert (swapped.axes, swapped.lateral_axis, swapped.paired_labels) == ((2,), 2, ((1, 2),))
    flat = plan_mirroring(kidneys, *_plans(flat=True, forward=(2, 0, 1)), mirror="lateral")
    assert flat.axes == ()


def test_the_lateral_axis_is_not_mirrored_alone_where_cases_are_stored_differently(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path / "d", (STRAIGHT, Y_IS_LATERAL), labels={"background": 0, "liver": 1})
    with pytest.raises(DatasetInvalid, match="--mirror none"):
        plan_mirroring(dataset, *_plans(), mirror="lateral")


def test_nothing_is_mirrored_where_that_is_wanted(tmp_path: Path) -> None:
    assert plan_mirroring(_dataset(tmp_path / "d"), *_plans(), mirror="none").axes == ()


def test_stated_pairs_count_instead_of_names(tmp_path: Path) -> None:
    labels = {"background": 0, "this": 1, "that": 2}
    dataset = _dataset(tmp_path / "d", labels=labels, pairs=[["this", "that"]])
    assert paired_labels(dataset.json) == (("this", "that"),)
    assert _mirroring(dataset).axes == (0, 1)
    assert paired_labels(_dataset(tmp_path / "none", pairs=[]).json) == ()


@pytest.mark.parametrize(
    ("pairs", "named"),
    [
        ([["kidney_left", "liver"]], "'liver' is no label"),
        ([["kidney_left"]], r"pairs\[0\]"),
        ([["kidney_left", "kidney_left"]], "named twice"),
        ("kidney_left", "pairs"),
    ],
)
def test_a_stated_pair_that_is_none_is_refused(tmp_path: Path, pairs: object, named: str) -> None:
    with pytest.raises(DatasetInvalid, match=named):
        paired_labels(_dataset(tmp_path / "d", pairs=pairs).json)


def test_regions_cannot_change_places(tmp_path: Path) -> None:
    labels = {"background": 0, "kidney_left": [1, 3], "kidney_right": [2, 4], "cyst": 3, "stone": 4}
    dataset = _dataset(tmp_path / "d", labels=labels, regions_class_order=[1, 2, 3, 4])
    assert _mirroring(dataset).axes == (0, 1)
    with pytest.raises(DatasetInvalid, match="'kidney_left' is a region"):
        _mirroring(dataset, "swap")
