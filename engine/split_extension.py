"""New cases in folds that are there: the folds are extended, and what was dealt before stays where it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from engine.errors import DatasetInvalid
from engine.fingerprint import CaseSummary
from engine.splits import Split


def uncovered(splits: Sequence[Split], cases: Sequence[str]) -> tuple[str, ...]:
    """Cases that no fold trains on or validates."""
    known = {name for split in splits for name in (*split.train, *split.val)}
    return tuple(name for name in cases if name not in known)


def extend_splits(
    splits: Sequence[Split], cases: Sequence[CaseSummary], *, patients: Mapping[str, str]
) -> tuple[Split, ...]:
    """The splits with every one of `cases` that no fold knows: in one fold's validation, in every other's training.

    Cases of one patient go together, to the fold that validates most of the patient's cases if there is one, else to
    the fold that validates fewest cases: the patients with most cases first, then the largest, so that each fold gets
    large and small ones. `patients` as in `stratified_splits`. Raises DatasetInvalid where there are not two folds.
    """
    new = set(uncovered(splits, [case.name for case in cases]))
    if not new:
        return tuple(splits)
    if len(splits) < 2:
        raise DatasetInvalid("one fold cannot be extended: its new cases would all be validated and none trained on")
    groups: dict[str, list[CaseSummary]] = {}
    for case in sorted(cases, key=lambda c: c.name):
        if case.name in new:
            # The prefixes keep a case's name from being taken for a patient's.
            group = f"patient {patients[case.name]}" if case.name in patients else f"case {case.name}"
            groups.setdefault(group, []).append(case)
    sizes = [len(split.val) for split in splits]
    added: list[set[str]] = [set() for _ in splits]
    added_ml = [0.0 for _ in splits]
    volumes = {group: sum(case.foreground_ml for case in members) / len(members) for group, members in groups.items()}
    for group in sorted(groups, key=lambda g: (-len(groups[g]), -volumes[g], g)):
        names = {case.name for case in groups[group]}
        home = _home(splits, next(iter(names)), patients)
        fold = min(range(len(splits)), key=lambda f: (sizes[f], added_ml[f], f)) if home is None else home
        added[fold] |= names
        sizes[fold] += len(names)
        added_ml[fold] += sum(case.foreground_ml for case in groups[group])
    return tuple(
        Split(
            train=tuple(sorted({*split.train, *(new - mine)})),
            val=tuple(sorted({*split.val, *mine})),
        )
        for split, mine in zip(splits, added, strict=True)
    )


def _home(splits: Sequence[Split], case: str, patients: Mapping[str, str]) -> int | None:
    """The fold that validates most cases of the case's patient; None where none does."""
    if case not in patients:
        return None
    count = Counter(
        {fold: sum(patients.get(name) == patients[case] for name in split.val) for fold, split in enumerate(splits)}
    )
    fold, most = min(count.items(), key=lambda item: (-item[1], item[0]))
    return fold if most else None
