"""engine.preprocessed: cases on disk, made once, and never half there."""
# ruff: noqa: E402

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.peers import require_peer

require_peer("torch")

from engine.dataset import open_dataset, read_case
from engine.errors import DatasetInvalid, InputRejected
from engine.labels import LabelManager
from engine.plans import read_plans
from engine.preprocessed import (
    PreprocessJob,
    case_names,
    locate,
    open_case,
    preprocess_dataset,
)
from engine.preprocessing import crop_to_nonzero, preprocess_labelled
from tests.support.nnunet_results import plans_json
from tests.support.raw_datasets import write_array
from tests.support.tiny_training import CASES, TINY, write_raw

PLAIN = {"labels": {"background": 0, "a": 1, "b": 2}}


@pytest.fixture
def job(tmp_path: Path) -> PreprocessJob:
    write_raw(tmp_path / "raw", TINY)
    plans = read_plans(plans_json(TINY, replace(TINY, name="3d_lowres", spacing=(2.0, 2.0, 2.0))))
    return PreprocessJob(
        plans=plans,
        configurations=tuple(plans.configurations.values()),
        dataset_json=open_dataset(tmp_path / "raw").json,
        folders={name: tmp_path / name for name in plans.configurations},
    )


def test_every_configuration_of_every_case_is_written_and_read_back(tmp_path: Path, job: PreprocessJob) -> None:
    dataset = open_dataset(tmp_path / "raw")
    assert preprocess_dataset(job, dataset.cases, processes=2) == len(CASES)
    for configuration in job.configurations:
        folder = tmp_path / configuration.name
        assert case_names(folder) == CASES
        for case in dataset.cases:
            loaded = read_case(case, dataset.json)
            cropped = crop_to_nonzero(loaded.volume, job.plans)
            [(_, image, labels)] = preprocess_labelled(cropped, job.plans, [configuration], loaded.labels.array)
            stored = open_case(folder, case.name, dataset.json.labels)
            np.testing.assert_array_equal(stored.image_CZYX, image)
            np.testing.assert_array_equal(stored.labels_1ZYX, labels[None])
            for key, rows in locate(labels, dataset.json.labels).items():
                np.testing.assert_array_equal(stored.locations[key], rows)


def test_a_case_is_made_again_only_where_it_changed_or_is_damaged(tmp_path: Path, job: PreprocessJob) -> None:
    dataset = open_dataset(tmp_path / "raw")
    preprocess_dataset(job, dataset.cases, processes=1)
    assert preprocess_dataset(job, dataset.cases, processes=1) == 0
    folder = tmp_path / TINY.name
    (folder / "case_00.json").unlink()
    # What a power failure may leave: a name without content.
    (folder / "case_01.npy").write_bytes(b"")
    labels = np.zeros((10, 16, 18), dtype=np.uint8)
    write_array(dataset.cases[2].label, labels, (1.0, 1.0, 1.0))
    os.utime(dataset.cases[2].label, (1, 1))
    assert preprocess_dataset(job, dataset.cases, processes=1) == 3
    assert preprocess_dataset(job, dataset.cases, processes=1) == 0
    assert (open_case(folder, "case_02", dataset.json.labels).labels_1ZYX[:, :, :, :] <= 0).all()


def test_other_plans_make_the_cases_again(tmp_path: Path, job: PreprocessJob) -> None:
    dataset = open_dataset(tmp_path / "raw")
    only = replace(job, configurations=job.configurations[:1])
    preprocess_dataset(only, dataset.cases, processes=1)
    coarser = replace(job.configurations[0], spacing_mm=(1.0, 1.0, 2.0))
    assert preprocess_dataset(replace(only, configurations=(coarser,)), dataset.cases, processes=1) == len(CASES)


def test_a_case_that_fails_is_named_and_leaves_nothing(tmp_path: Path, job: PreprocessJob) -> None:
    dataset = open_dataset(tmp_path / "raw")
    write_array(dataset.cases[1].channels[0], np.full((10, 16, 18), np.nan, dtype=np.float32), (1.0, 1.0, 1.0))
    with pytest.raises(InputRejected, match="case_01"):
        preprocess_dataset(job, dataset.cases, processes=1)
    assert not list(tmp_path.glob("3d_*/*case_01*"))


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("case_00.json", None, r"case_00\.json"),
        ("case_00.json", json.dumps({"format": 99}), "format: is not 1: preprocess the dataset again"),
        ("case_00.npy", "", "not readable"),
        ("case_00_seg.npy", None, "not readable"),
        ("case_00_locations.npz", "no zip", "not readable"),
    ],
)
def test_a_damaged_case_is_refused_with_its_name(
    tmp_path: Path, job: PreprocessJob, file: str, content: str | None, problem: str
) -> None:
    dataset = open_dataset(tmp_path / "raw")
    preprocess_dataset(job, dataset.cases[:1], processes=1)
    path = tmp_path / TINY.name / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(DatasetInvalid, match=problem):
        open_case(tmp_path / TINY.name, "case_00", dataset.json.labels)


def test_locations_are_voxels_of_their_class_at_most_ten_thousand_or_a_hundredth() -> None:
    labels = np.zeros((20, 60, 60), dtype=np.int16)
    labels[:10] = 1
    labels[15, 3:5, 3:5] = 2
    labels[0, 0, 0] = -1
    found = locate(labels, LabelManager.from_dataset_json(PLAIN))
    assert {key: len(rows) for key, rows in found.items()} == {1: 10_000, 2: 4}
    assert len(np.unique(found[1], axis=0)) == 10_000
    for value, rows in found.items():
        assert (labels[None][tuple(rows.T)] == value).all()
    assert found[2].tolist() == [[0, 15, 3, 3], [0, 15, 3, 4], [0, 15, 4, 3], [0, 15, 4, 4]]
    many = np.ones((120, 110, 100), dtype=np.int16)
    assert len(locate(many, LabelManager.from_dataset_json(PLAIN))[1]) == 13_200


def test_locations_of_regions_and_of_what_is_annotated() -> None:
    labels = np.array([[[-1, 0, 1, 2, 3, 3]]], dtype=np.int16)
    plain = LabelManager.from_dataset_json({"labels": {**PLAIN["labels"], "ignore": 3}})
    assert {key: rows[:, 3].tolist() for key, rows in locate(labels, plain).items()} == {
        1: [2],
        2: [3],
        (-1, 0, 1, 2): [0, 1, 2, 3],
    }
    regions = LabelManager.from_dataset_json(
        {"labels": {"background": 0, "both": [1, 2], "inner": 2}, "regions_class_order": [1, 2]}
    )
    found = locate(labels[..., :4], regions)
    assert {key: rows[:, 3].tolist() for key, rows in found.items()} == {(1, 2): [2, 3], (2,): [3]}
    assert locate(np.zeros((1, 2, 2), dtype=np.int16), regions)[1, 2].shape == (0, 4)


@pytest.mark.peer("blosc2")
def test_nnunets_arrays_are_read_and_its_pickles_are_not(tmp_path: Path) -> None:
    import blosc2

    random = np.random.default_rng(0)
    image = random.normal(size=(2, 6, 7, 8)).astype(np.float32)
    labels = random.integers(-1, 3, size=(1, 6, 7, 8)).astype(np.int16)
    blosc2.asarray(image, urlpath=str(tmp_path / "case_7.b2nd"))
    blosc2.asarray(labels, urlpath=str(tmp_path / "case_7_seg.b2nd"))
    (tmp_path / "case_7.pkl").write_bytes(b"cos\nabort\n(tR.")
    manager = LabelManager.from_dataset_json(PLAIN)
    assert case_names(tmp_path) == ("case_7",)
    case = open_case(tmp_path, "case_7", manager)
    part = (slice(None), slice(1, 4), slice(0, 7), slice(2, 8))
    np.testing.assert_array_equal(case.image_CZYX[part], image[part])
    np.testing.assert_array_equal(case.labels_1ZYX[part[:1] + part[1:]], labels[part])
    assert sorted(case.locations) == [1, 2]
    (tmp_path / "case_7_seg.b2nd").write_bytes(b"no array")
    with pytest.raises(DatasetInvalid, match=r"case_7_seg\.b2nd: not readable as a Blosc2 array"):
        open_case(tmp_path, "case_7", manager)


def test_labels_that_int16_does_not_hold_are_refused_before_anything_is_written(job: PreprocessJob) -> None:
    whole = {"background": 0, **{f"part {n}": list(range(4000 * n, 4000 * (n + 1))) for n in range(9)}}
    whole["part 0"] = list(range(1, 4000))
    labels = LabelManager.from_dataset_json({"labels": whole, "regions_class_order": [4000 * n + 1 for n in range(9)]})
    wide = replace(job, dataset_json=replace(job.dataset_json, labels=labels))
    with pytest.raises(DatasetInvalid, match="labels up to 35999; preprocessed cases hold 32767"):
        preprocess_dataset(wide, [], processes=1)
