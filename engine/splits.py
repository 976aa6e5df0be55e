"""Splits of a dataset into folds, as nnU-Net's splits_final.json: [{"train": [cases], "val": [cases]}, ...].

nnU-Net's own split is random over cases (nnU-Net v2). The stratified one keeps the cases of a patient
together and gives every fold small and large, complete and incomplete cases alike.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.errors import DatasetInvalid
from engine.fingerprint import CaseSummary
from engine.json_reader import MAX_JSON_BYTES, Reader
from engine.json_writer import write_json

SPLITS_JSON = "splits_final.json"
FOLDS = 5

_SEED = 12345
_MAX_FOLDS = 1000


@dataclass(frozen=True, kw_only=True)
class Split:
    """One fold: names of the cases to train on and to validate on."""

    train: tuple[str, ...]
    val: tuple[str, ...]


def nnunet_splits(cases: Sequence[str], *, folds: int = FOLDS) -> tuple[Split, ...]:
    """nnU-Net's default: shuffled with a fixed seed, neither stratified nor grouped.

    Raises DatasetInvalid when there are fewer cases than folds.
    """
    _check_enough(len(cases), "case(s)", folds)
    names = sorted(cases)
    order = np.arange(len(names))
    np.random.RandomState(_SEED).shuffle(order)
    return _splits(names, [{names[index] for index in part} for part in np.array_split(order, folds)])


def stratified_splits(
    cases: Sequence[CaseSummary], *, patients: Mapping[str, str] | None = None, folds: int = FOLDS, seed: int = _SEED
) -> tuple[Split, ...]:
    """Folds of whole patients, alike in foreground volume (tertiles) and in the labels that occur.

    `patients` maps cases to patients; a case that it does not name is a patient of its own. Raises DatasetInvalid when
    there are fewer patients than folds.
    """
    return _splits([case.name for case in cases], _deal(cases, patients or {}, folds, seed))


def hold_out(
    cases: Sequence[CaseSummary],
    *,
    patients: Mapping[str, str] | None = None,
    share: float = 0.1,
    seed: int = _SEED,
) -> Split:
    """Takes `share` of the cases out as `val`, in whole patients, alike to the rest as in `stratified_splits`.

    As near to the share as whole patients allow, and no label's only cases unless there is no other way. At least one
    patient is taken and one is left; DatasetInvalid when there are not two.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"share {share}: more than 0 and at most 0.5 is needed")
    parts = [part for part in _deal(cases, patients or {}, round(1 / share), seed, enough=2) if part]
    wanted, taken = share * len(cases), set[str]()
    parts.sort(key=lambda part: (_takes_all_of_a_label(part, cases), abs(len(part) - wanted)))
    for part in parts:
        both = taken | part
        nearer = abs(len(both) - wanted) < abs(len(taken) - wanted)
        if not taken or (nearer and not _takes_all_of_a_label(both, cases)):
            taken = both
    return _splits([case.name for case in cases], [taken])[0]


def _takes_all_of_a_label(taken: Collection[str], cases: Sequence[CaseSummary]) -> bool:
    left = {label for case in cases if case.name not in taken for label in case.labels}
    return any(label not in left for case in cases for label in case.labels)


def patients_in_both(split: Split, patients: Mapping[str, str]) -> set[str]:
    """Patients who have cases on both sides of a split: its validation is too good to be true."""
    train, val = ({patients[case] for case in side if case in patients} for side in (split.train, split.val))
    return train & val


KEEPS_PATIENTS_TOGETHER = (
    f"without the old {SPLITS_JSON}, `seggate plan --splits stratified` makes folds of whole patients, to be trained "
    "again"
)
"""What to do about `mixed_patients`."""


def mixed_patients(splits: Sequence[Split], patients: Mapping[str, str]) -> str | None:
    """A sentence on how many patients are on both sides of a fold, without their names; None where there are none."""
    shared = set[str]().union(*(patients_in_both(split, patients) for split in splits))
    if not shared:
        return None
    return f"{len(shared)} patient(s) are in training and validation of one fold, which makes validation too good"


def read_splits(path: Path, cases: Sequence[str], *, excluded: Collection[str] = ()) -> tuple[Split, ...]:
    """The folds without their `excluded` cases.

    Raises DatasetInvalid, naming fold and case, for a file that is no list of splits, names a case that the dataset
    does not have, has a case on both sides of a fold, or leaves a side empty."""
    known = {*cases, *excluded}
    splits = []
    for index, fold in enumerate(_folds(path)):
        where = f"{path.name}: fold {index}"
        entry = Reader(fold, where=where, error=DatasetInvalid)
        split = Split(
            train=entry.texts("train", lengths=(1, 10**7)),
            val=entry.texts("val", lengths=(1, 10**7)),
        )
        unknown = sorted({*split.train, *split.val} - known)
        if unknown:
            raise DatasetInvalid(f"{where}: {unknown[0]} is no case of the dataset ({len(unknown)} such)")
        both = sorted(set(split.train) & set(split.val))
        if both:
            raise DatasetInvalid(f"{where}: {both[0]} is trained on and validated on ({len(both)} such)")
        kept = Split(
            train=tuple(case for case in split.train if case not in excluded),
            val=tuple(case for case in split.val if case not in excluded),
        )
        if not kept.train or not kept.val:
            side = "validate" if kept.train else "train"
            raise DatasetInvalid(f"{where}: every case to {side} on is excluded; remove the file and plan again")
        splits.append(kept)
    return tuple(splits)


def write_splits(splits: Sequence[Split], path: Path) -> None:
    write_json([{"train": list(split.train), "val": list(split.val)} for split in splits], path)


def _folds(path: Path) -> list[object]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DatasetInvalid(f"{path.name}: larger than {MAX_JSON_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetInvalid(f"{path.name}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetInvalid(f"{path.name}: not readable as JSON") from error
    if not isinstance(content, list) or not 1 <= len(content) <= _MAX_FOLDS:
        raise DatasetInvalid(f"{path.name}: a list of 1 to {_MAX_FOLDS} folds is needed")
    return content


def _check_enough(found: int, what: str, needed: int) -> None:
    if found < needed:
        raise DatasetInvalid(f"{found} {what}; {needed} are needed to split the dataset")


def _splits(names: Sequence[str], validations: Sequence[set[str]]) -> tuple[Split, ...]:
    ordered = sorted(names)
    return tuple(
        Split(
            train=tuple(name for name in ordered if name not in val),
            val=tuple(name for name in ordered if name in val),
        )
        for val in validations
    )


def _deal(
    cases: Sequence[CaseSummary], patients: Mapping[str, str], parts: int, seed: int, enough: int | None = None
) -> list[set[str]]:
    """Patients dealt to parts, one stratum after the other: each goes where its stratum has fewest cases so far, then
    where there are fewest cases at all. Large patients first, so that the small ones even it out."""
    groups: dict[str, list[CaseSummary]] = {}
    for case in sorted(cases, key=lambda c: c.name):
        # The prefixes keep a case's name from being taken for a patient's.
        group = f"patient {patients[case.name]}" if case.name in patients else f"case {case.name}"
        groups.setdefault(group, []).append(case)
    _check_enough(len(groups), "patient(s)", parts if enough is None else enough)
    volume = {group: float(np.mean([case.foreground_ml for case in members])) for group, members in groups.items()}
    low, high = np.quantile(list(volume.values()), (1 / 3, 2 / 3))
    strata: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for group, members in groups.items():
        tertile = int(volume[group] > low) + int(volume[group] > high)
        labels = tuple(sorted({label for case in members for label in case.labels}))
        strata.setdefault((tertile, labels), []).append(group)
    state = np.random.RandomState(seed)
    dealt: list[set[str]] = [set() for _ in range(parts)]
    for key in sorted(strata):
        names = [strata[key][index] for index in state.permutation(len(strata[key]))]
        names.sort(key=lambda group: -len(groups[group]))
        of_stratum: Counter[int] = Counter()
        for group in names:
            part = min(range(parts), key=lambda p: (of_stratum[p], len(dealt[p]), p))
            of_stratum[part] += len(groups[group])
            dealt[part] |= {case.name for case in groups[group]}
    return dealt
