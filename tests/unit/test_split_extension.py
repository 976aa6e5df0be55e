"""New cases in old folds: everybody is somewhere, nobody moves, patients stay together."""

from __future__ import annotations

import pytest

from engine.errors import DatasetInvalid
from engine.fingerprint import CaseSummary
from engine.split_extension import extend_splits, uncovered
from engine.splits import Split, nnunet_splits, patients_in_both

OLD = [f"old_{index:02}" for index in range(20)]
NEW = [f"new_{index:02}" for index in range(10)]
SPLITS = nnunet_splits(OLD)


def _cases(*names: str) -> list[CaseSummary]:
    return [CaseSummary(name=name, foreground_ml=1.0 + index % 7, labels=(1,)) for index, name in enumerate(names)]


def test_new_cases_are_dealt_evenly_and_old_ones_stay_where_they_are() -> None:
    found = extend_splits(SPLITS, _cases(*OLD, *NEW), patients={})
    assert uncovered(SPLITS, [*OLD, *NEW]) == tuple(NEW)
    assert uncovered(found, [*OLD, *NEW]) == ()
    assert [len(split.val) for split in found] == [6] * 5
    for before, after in zip(SPLITS, found, strict=True):
        assert set(before.val) == set(after.val) & set(OLD)
        assert set(before.train) == set(after.train) & set(OLD)
        assert sorted((*after.train, *after.val)) == sorted([*OLD, *NEW])
    assert sorted(name for split in found for name in split.val if name in NEW) == NEW


def test_a_second_time_nothing_changes() -> None:
    once = extend_splits(SPLITS, _cases(*OLD, *NEW), patients={})
    assert extend_splits(once, _cases(*OLD, *NEW), patients={}) == once
    assert extend_splits(SPLITS, _cases(*OLD), patients={}) == SPLITS


def test_cases_of_a_patient_go_together_to_where_the_patient_is() -> None:
    known = SPLITS[3].val[0]
    patients = {known: "p", "new_00": "p", "new_01": "p", **dict.fromkeys(NEW[2:6], "q")}
    found = extend_splits(SPLITS, _cases(*OLD, *NEW), patients=patients)
    assert {"new_00", "new_01"} <= set(found[3].val)
    assert sum(set(NEW[2:6]) <= set(split.val) for split in found) == 1
    for split in found:
        assert patients_in_both(split, patients) == set()


def test_large_and_small_cases_are_spread() -> None:
    cases = [CaseSummary(name=name, foreground_ml=float(index), labels=(1,)) for index, name in enumerate(NEW)]
    found = extend_splits(SPLITS, [*_cases(*OLD), *cases], patients={})
    volumes = [sum(NEW.index(name) for name in split.val if name in NEW) for split in found]
    assert max(volumes) - min(volumes) <= 2


def test_a_case_that_is_only_ever_trained_on_is_not_new() -> None:
    splits = (Split(train=("a", "b"), val=("c",)), Split(train=("b", "c"), val=("a",)))
    assert uncovered(splits, ["a", "b", "c"]) == ()
    assert extend_splits(splits, _cases("a", "b", "c"), patients={}) == splits


def test_one_fold_alone_is_not_extended() -> None:
    with pytest.raises(DatasetInvalid, match="one fold cannot be extended"):
        extend_splits(SPLITS[:1], _cases(*OLD, "new"), patients={})
