"""Left and right: which labels are each other's other side, and along which axis the images run from side to side.

nnU-Net mirrors along every axis, and so learns a left kidney as a right one. Here the lateral axis is found from the
images' geometry; where labels are sides it is not mirrored, or it is and the labels of a pair change places. A left
kidney alone is a side too: mirrored, it would be looked for where the right one is.

Labels are paired by their names ("kidney_left", "kidney_right"), or by the key `pairs` of dataset.json:
[["first name", "second name"], ...], which is ours and ignored by nnU-Net; with it names do not count ([]: no label is
a side).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from engine import anatomy
from engine.dataset import DatasetJson, RawDataset
from engine.errors import DatasetInvalid
from engine.json_reader import Reader
from engine.nifti import read_orientation
from engine.plans import Configuration, Plans
from engine.volume import AS_STORED

SidesPolicy = Literal["keep", "swap", "ignore"]
"""keep: the lateral axis is not mirrored where labels are sides. swap: it is, and paired labels change places.
ignore: nnU-Net's way, every axis is mirrored."""

MirrorPolicy = Literal["all", "lateral", "none"]
"""all: every axis, as nnU-Net. lateral: only the axis from one side of the patient to the other. none: nothing, as
nnU-Net's NoMirroring trainers. Predictions are mirrored along the same axes."""


ONE_ORIENTATION = (
    "Store all cases in one orientation, or let them be reordered when they are read: "
    '"overwrite_image_reader_writer": "SimpleITKIOWithReorient" in dataset.json, then plan and preprocess again'
)
"""What to do where cases are stored differently."""


@dataclass(frozen=True, kw_only=True)
class Mirroring:
    """Axes that are mirrored in training, of a configuration's patch. `lateral_axis` and `paired_labels` (values) are
    given where labels change places with it; that axis is not mirrored when the model predicts. `note` says what was
    found where sides matter."""

    axes: tuple[int, ...]
    lateral_axis: int | None = None
    paired_labels: tuple[tuple[int, int], ...] = ()
    note: str | None = None


def paired_labels(dataset_json: DatasetJson) -> tuple[tuple[str, str], ...]:
    """Names of labels that are left and right of one thing. Raises DatasetInvalid for a stated pair that is none."""
    names = [label.name for label in dataset_json.labels.foreground]
    if "pairs" not in dataset_json.document:
        return tuple(
            (one, other) for one, other in anatomy.pairs(names).items() if names.index(one) < names.index(other)
        )
    reader = Reader(dataset_json.document, where="dataset.json", error=DatasetInvalid)
    pairs = []
    for index, entry in enumerate(reader.array("pairs", lengths=(0, len(names)))):
        place = f"pairs[{index}]"
        one, other = Reader({place: entry}, where=reader.where, error=DatasetInvalid).texts(place, lengths=(2, 2))
        for name in (one, other):
            if name not in names:
                raise reader.fail(place, f"{name[:80]!r} is no label")
        pairs.append((one, other))
    repeated = [name for name, count in Counter(name for pair in pairs for name in pair).items() if count > 1]
    if repeated:
        raise reader.fail("pairs", f"{repeated[0]!r} is named twice")
    return tuple(pairs)


def lateral_axes(dataset: RawDataset) -> frozenset[int]:
    """The axes (of Z, Y, X as the cases are read) that run from one side of the patient to the other, over all cases.

    One axis as a rule; several where cases are stored differently. Reads headers only; raises InputRejected.
    """
    return frozenset(2 - _lateral_index(code) for code in _orientations(dataset))


def lateral_direction(code: str) -> tuple[int, str]:
    """Which index axis (x, y, z: 0 to 2) of an orientation code runs from side to side, and to which: L or R."""
    index = _lateral_index(code)
    return index, code[index]


def plan_mirroring(
    dataset: RawDataset,
    plans: Plans,
    configuration: Configuration,
    policy: SidesPolicy = "keep",
    mirror: MirrorPolicy = "all",
) -> Mirroring:
    """Axes of `mirror`, less what labels that are sides forbid.

    Raises DatasetInvalid, naming two cases, when labels are sides and one case is stored from left to right and
    another otherwise: nothing would tell the network which side is which (not with `ignore`, where it does not know
    anyway); and when labels of several values, or without their other side, shall change places.
    """
    if policy != "ignore" and has_sides(dataset.json):
        _refuse_mixed_sides(dataset)
    if mirror == "none":
        return Mirroring(axes=(), note="nothing is mirrored")
    planned = _plan_sides(dataset, plans, configuration, policy)
    if mirror == "all":
        return planned
    found = lateral_axes(dataset)
    if len(found) > 1:
        raise DatasetInvalid(
            f"the cases run from side to side along different axes ({_list(sorted(found))} as stored), so none can be "
            "mirrored alone; store the cases alike, or mirror nothing (--mirror none)"
        )
    lateral = _patch_axes(found, plans, configuration)
    axes = tuple(axis for axis in planned.axes if axis in lateral)
    done = f"mirrored along axis {_list(axes)} of the patch alone" if axes else "nothing is mirrored"
    return replace(planned, axes=axes, note="; ".join(filter(None, (planned.note, done))))


def _plan_sides(dataset: RawDataset, plans: Plans, configuration: Configuration, policy: SidesPolicy) -> Mirroring:
    dimensions = len(configuration.patch_size)
    every = tuple(range(dimensions))
    if policy == "ignore" or not has_sides(dataset.json):
        return Mirroring(axes=every)
    pairs, alone = paired_labels(dataset.json), unpaired_labels(dataset.json)
    names = _sides(pairs, alone)
    found = lateral_axes(dataset)
    lateral = _patch_axes(found, plans, configuration)
    if not lateral:
        return Mirroring(axes=every, note=f"{names}; no axis of the patch runs from side to side")
    if policy == "keep":
        kept = tuple(axis for axis in every if axis not in lateral)
        opened = " (`pairs`: [] in dataset.json says that no label is a side)" if alone else ""
        return Mirroring(axes=kept, note=f"{names}: axis {_list(lateral)} of the patch is not mirrored{opened}")
    if alone:
        raise DatasetInvalid(
            f"{alone[0]!r} is a side without its other, so it cannot change places; state `pairs` in dataset.json, or "
            "do not mirror (--sides keep)"
        )
    regions = {label.name: label.region for label in dataset.json.labels.foreground}
    for name in (name for pair in pairs for name in pair):
        if len(regions[name]) > 1:
            raise DatasetInvalid(
                f"{name!r} is a region of several labels, which cannot change places as one; state the pairs of its "
                "labels, or do not mirror (--sides keep)"
            )
    return Mirroring(
        axes=every,
        lateral_axis=lateral[0],
        paired_labels=tuple((regions[one][0], regions[other][0]) for one, other in pairs),
        note=f"{names}: they change places when axis {lateral[0]} of the patch is mirrored",
    )


def unpaired_labels(dataset_json: DatasetJson) -> list[str]:
    """Names of labels that say left or right and belong to no pair; none where `pairs` is stated."""
    if "pairs" in dataset_json.document:
        return []
    return anatomy.unpaired([label.name for label in dataset_json.labels.foreground])


def has_sides(dataset_json: DatasetJson) -> bool:
    """Whether left and right matter. Raises DatasetInvalid for a stated pair that is none."""
    return bool(paired_labels(dataset_json) or unpaired_labels(dataset_json))


def _sides(pairs: Sequence[tuple[str, str]], alone: Sequence[str]) -> str:
    """The labels that are sides, in words."""
    found = []
    for names, are in (
        ([f"{one} and {other}" for one, other in pairs], "are sides"),
        (alone, "without its other side" if len(alone) == 1 else "without their other sides"),
    ):
        if names:
            found.append(f"{', '.join(names[:3])}{' and more' if len(names) > 3 else ''} {are}")
    return "; ".join(found)


def _orientations(dataset: RawDataset) -> dict[str, str]:
    """The orientation codes in which cases are read, each with the first case that has it."""
    if dataset.json.orientation != AS_STORED:
        return {dataset.json.orientation: dataset.cases[0].name}
    found: dict[str, str] = {}
    for case in dataset.cases:
        found.setdefault(read_orientation(case.channels[0]), case.name)
    return found


def _refuse_mixed_sides(dataset: RawDataset) -> None:
    found = _orientations(dataset)
    first = next(iter(found))
    for code, case in found.items():
        if lateral_direction(code) != lateral_direction(first):
            raise DatasetInvalid(
                f"{found[first]} is stored {first} and {case} {code}: left and right are not on the same side of the "
                f"array, and the labels are sides of each other. {ONE_ORIENTATION}"
            )


def _patch_axes(axes: Collection[int], plans: Plans, configuration: Configuration) -> list[int]:
    """Axes of Z, Y, X as the axes of a configuration's patch, ascending; a 2D patch has the last two network axes."""
    missing = 3 - len(configuration.patch_size)
    found = (plans.transpose_forward.index(axis) - missing for axis in axes)
    return sorted(axis for axis in found if axis >= 0)


def _lateral_index(code: str) -> int:
    """Which index axis (x, y, z) of an orientation code runs between left and right."""
    return next(index for index, letter in enumerate(code) if letter in "LR")


def _list(axes: Sequence[int]) -> str:
    return " and ".join(map(str, axes))
