"""engine.splits: nnU-Net's folds; folds of whole patients, evened out; files in nnU-Net's format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.errors import DatasetInvalid
from engine.fingerprint import CaseSummary
from engine.splits import (
    Split,
    hold_out,
    mixed_patients,
    nnunet_splits,
    patients_in_both,
    read_splits,
    stratified_splits,
    write_splits,
)


def _cases(count: int) -> list[CaseSummary]:
    """Volumes from 1 ml up; every fourth case lacks label 2."""
    return [
        CaseSummary(name=f"case_{i:03}", foreground_ml=1.0 + i, labels=(1,) if i % 4 == 0 else (1, 2))
        for i in range(count)
    ]


CASES = _cases(60)
# Three cases each, neighbours in volume.
PATIENTS = {case.name: f"patient {index // 3}" for index, case in enumerate(CASES)}


def _is_partition(splits: tuple[Split, ...], cases: list[CaseSummary]) -> None:
    names = sorted(case.name for case in cases)
    assert sorted(name for split in splits for name in split.val) == names
    for split in splits:
        assert split.val
        assert sorted((*split.train, *split.val)) == names


@pytest.mark.requirement("ART-11")
@pytest.mark.parametrize(
    ("count", "folds"),
    [
        (10, [[0, 7], [3, 9], [4, 6], [1, 8], [2, 5]]),
        (12, [[0, 3, 8], [7, 10, 11], [6, 9], [1, 4], [2, 5]]),
    ],
)
def test_folds_are_nnunets(count: int, folds: list[list[int]]) -> None:
    names = [f"{index:02}" for index in range(count)]
    splits = nnunet_splits(names[::-1])
    assert [[int(name) for name in split.val] for split in splits] == folds
    for split in splits:
        assert sorted((*split.train, *split.val)) == names


@pytest.mark.requirement("ART-11")
@pytest.mark.peer("shared-data")
def test_the_file_of_the_hippocampus_set_is_nnunets(tmp_path: Path, shared_root: Path) -> None:
    reference = shared_root / "reference/plans/hippocampus_004/splits_final.json"
    wanted = json.loads(reference.read_text())
    write_splits(nnunet_splits([*wanted[0]["train"], *wanted[0]["val"]]), tmp_path / "splits_final.json")
    assert json.loads((tmp_path / "splits_final.json").read_text()) == wanted


def test_patients_on_both_sides_of_any_fold_are_counted_and_not_named() -> None:
    patients = {"a": "Smith", "b": "Smith", "c": "Jones", "d": "Jones"}
    apart, torn = Split(train=("a", "b"), val=("c", "d")), Split(train=("a", "c"), val=("b", "d", "e"))
    assert mixed_patients([apart], patients) is None
    assert mixed_patients([torn], {}) is None
    found = mixed_patients([apart, torn, torn], patients)
    assert found == "2 patient(s) are in training and validation of one fold, which makes validation too good"


@pytest.mark.requirement("ART-10")
def test_patients_are_never_on_both_sides() -> None:
    splits = stratified_splits(CASES, patients=PATIENTS)
    _is_partition(splits, CASES)
    for split in splits:
        assert patients_in_both(split, PATIENTS) == set()
    assert any(patients_in_both(split, PATIENTS) for split in nnunet_splits([case.name for case in CASES]))


@pytest.mark.requirement("ART-10")
def test_folds_are_alike_in_volume_and_labels() -> None:
    of_name = {case.name: case for case in CASES}
    for split in stratified_splits(CASES):
        fold = [of_name[name] for name in split.val]
        assert len(fold) == 12
        assert sum(case.labels == (1,) for case in fold) == 3
        tertiles = np.histogram([case.foreground_ml for case in fold], bins=[0, 21, 41, 99])[0]
        assert tertiles.tolist() == [4, 4, 4]


def test_the_same_seed_gives_the_same_folds_whatever_the_order_of_cases() -> None:
    assert stratified_splits(CASES, seed=1) == stratified_splits(CASES[::-1], seed=1)
    assert stratified_splits(CASES, seed=1) != stratified_splits(CASES, seed=2)


def test_uneven_patients_give_even_folds() -> None:
    patients = {case.name: "large" for case in CASES[:10]}
    splits = stratified_splits(CASES, patients=patients)
    _is_partition(splits, CASES)
    assert max(len(split.val) for split in splits) <= 16


def test_every_fold_has_a_case_when_there_are_as_many_patients_as_folds() -> None:
    cases = _cases(5)
    _is_partition(stratified_splits(cases), cases)


def test_too_few_patients_are_an_error_with_the_numbers() -> None:
    with pytest.raises(DatasetInvalid, match=r"2 patient\(s\); 5 are needed"):
        stratified_splits(_cases(6), patients={f"case_{i:03}": f"p{i // 3}" for i in range(6)})
    with pytest.raises(DatasetInvalid, match=r"4 case\(s\); 5 are needed"):
        nnunet_splits(["a", "b", "c", "d"])


@pytest.mark.requirement("ART-10")
def test_the_hold_out_is_a_tenth_of_whole_patients_alike_to_the_rest() -> None:
    out = hold_out(CASES)
    assert 5 <= len(out.val) <= 8
    volumes = {case.name: case.foreground_ml for case in CASES}
    assert np.mean([volumes[n] for n in out.val]) == pytest.approx(np.mean([volumes[n] for n in out.train]), rel=0.35)
    grouped = hold_out(CASES, patients=PATIENTS)
    assert patients_in_both(grouped, PATIENTS) == set()
    assert len(grouped.val) in (6, 9)
    assert sorted((*grouped.train, *grouped.val)) == [case.name for case in CASES]


@pytest.mark.parametrize(
    ("sizes", "held_out"),
    [((50, *[1] * 10), 6), ((10, 5, 5), 5), ((19, 1), 1), ((30, 20, 3, 3, 2, 2), 6), ((10, 10), 10), ((1,) * 25, 3)],
)
def test_the_hold_out_is_as_near_to_its_share_as_whole_patients_allow(sizes: tuple[int, ...], held_out: int) -> None:
    """A tenth of the cases, though one patient has most of them."""
    cases: list[CaseSummary] = []
    patients: dict[str, str] = {}
    for patient, size in enumerate(sizes):
        for index in range(size):
            cases.append(CaseSummary(name=f"{patient}_{index}", foreground_ml=1.0 + len(cases), labels=(1,)))
            patients[f"{patient}_{index}"] = f"patient {patient}"
    out = hold_out(cases, patients=patients)
    assert (len(out.val), len(out.train)) == (held_out, sum(sizes) - held_out)
    assert patients_in_both(out, patients) == set()


def test_the_hold_out_does_not_take_the_only_cases_of_a_label() -> None:
    for rare in range(12):
        cases = [
            CaseSummary(name=f"case_{i:03}", foreground_ml=1.0 + i, labels=(1, 2) if i == rare else (1,))
            for i in range(12)
        ]
        assert f"case_{rare:03}" in hold_out(cases).train


def test_the_hold_out_leaves_somebody_on_each_side() -> None:
    out = hold_out(_cases(2))
    assert len(out.train) == len(out.val) == 1
    with pytest.raises(DatasetInvalid, match=r"1 patient\(s\); 2 are needed"):
        hold_out(_cases(3), patients={f"case_{i:03}": "one" for i in range(3)})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    splits = stratified_splits(CASES)
    write_splits(splits, tmp_path / "splits_final.json")
    assert read_splits(tmp_path / "splits_final.json", [case.name for case in CASES]) == splits


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "not readable"),
        ("{}", "a list of 1"),
        ("[]", "a list of 1"),
        ("[3]", "fold 0: an object"),
        ('[{"train": ["a"]}]', "val is missing"),
        ('[{"train": ["a"], "val": []}]', "fold 0: val"),
        ('[{"train": ["a"], "val": [1]}]', r"val\[0\]"),
        ('[{"train": ["a"], "val": ["b"]}, {"train": ["a"], "val": ["x"]}]', "fold 1: x is no case"),
        ('[{"train": ["a", "b"], "val": ["b"]}]', "b is trained on and validated on"),
    ],
)
def test_a_wrong_file_is_refused_with_fold_and_case(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text(content)
    with pytest.raises(DatasetInvalid, match=named):
        read_splits(path, ["a", "b"])
