"""engine.online_validation: figures of an epoch on patches are those of counting and measuring them one by one."""
# ruff: noqa: E402

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.labels import LabelManager
from engine.metrics import evaluated_regions, measure_case
from engine.online_validation import SURFACE_PATCHES, PatchValidation

SPACING_MM = (3.0, 1.0, 0.5)
LABELS: dict[str, Any] = {"background": 0, "first": 1, "second": 2}
REGIONS: dict[str, Any] = {"background": 0, "whole": [1, 2], "core": 2}


def manager(labels: dict[str, Any], **others: Any) -> LabelManager:
    return LabelManager.from_dataset_json({"labels": labels, **others})


def blobs(seed: int, count: int, shape: tuple[int, ...] = (8, 12, 14)) -> np.ndarray[Any, np.dtype[np.int16]]:
    """(B, *shape): boxes of labels 1 and 2."""
    random = np.random.default_rng(seed)
    labels = np.zeros((count, *shape), dtype=np.int16)
    for patch in labels:
        for value in (1, 2):
            low = [int(random.integers(0, size // 2)) for size in shape]
            patch[tuple(slice(start, start + size // 2) for start, size in zip(low, shape, strict=True))] = value
    return labels


def logits_of(found: np.ndarray[Any, Any], labels: LabelManager) -> torch.Tensor:
    """Logits that say exactly `found`, in bf16 as a training has them."""
    heads = [found == v for v in labels.values]
    if labels.has_regions:
        heads = [np.isin(found, label.region) for label in labels.foreground]
    return torch.from_numpy(np.stack(heads, axis=1) * 8.0 - 4.0).to(torch.bfloat16)


@pytest.mark.parametrize(
    "labels",
    [manager(LABELS), manager(REGIONS, regions_class_order=[1, 2]), manager({**LABELS, "ignore": 3})],
    ids=["labels", "regions", "ignore label"],
)
def test_figures_are_those_of_every_patch_by_itself(labels: LabelManager) -> None:
    there, found = blobs(1, SURFACE_PATCHES), blobs(2, SURFACE_PATCHES)
    if labels.ignore_label is not None:
        there[:, :2] = labels.ignore_label
    whole = PatchValidation(labels, spacing_mm=SPACING_MM, batch_size=2, samples=range(2))
    for part in (slice(0, 2), slice(2, 4)):
        whole.add(logits_of(found[part], labels), torch.from_numpy(there[part]))
    regions = evaluated_regions(labels)
    cases = [
        measure_case(t, f.astype(np.uint8), SPACING_MM, regions, ignore_label=labels.ignore_label)
        for t, f in zip(there, found, strict=True)
    ]
    for index, region in enumerate(regions):
        both = sum(case[region].true_positives for case in cases)
        wrong = sum(case[region].false_positives + case[region].false_negatives for case in cases)
        assert whole.figures.dice_per_class[index] == pytest.approx(2 * both / (2 * both + wrong))
    expected = np.mean([np.mean([case[region].hd95_mm for case in cases]) for region in regions])
    assert whole.figures.hd95_mm == pytest.approx(expected)


def test_an_empty_side_is_the_patchs_diagonal_and_two_are_no_value() -> None:
    labels = manager(LABELS)
    there = blobs(1, 2)
    found = PatchValidation(labels, spacing_mm=SPACING_MM, batch_size=2, samples=range(2))
    found.add(logits_of(np.zeros_like(there), labels), torch.from_numpy(there))
    assert found.figures.hd95_mm == pytest.approx(np.hypot.reduce(np.multiply((8, 12, 14), SPACING_MM)))
    assert found.figures.dice_per_class == (0.0, 0.0)
    nothing = PatchValidation(labels, spacing_mm=SPACING_MM, batch_size=2, samples=range(2))
    nothing.add(logits_of(np.zeros_like(there), labels), torch.zeros(there.shape, dtype=torch.int16))
    assert nothing.figures.hd95_mm is None
    assert nothing.figures.dice_per_class == (None, None)


def test_2d_patches_are_measured_in_their_plane() -> None:
    labels = manager(LABELS)
    there = np.zeros((1, 20, 30), dtype=np.int16)
    there[0, 5:10, 5:10] = 1
    found = np.roll(there, 4, axis=2)
    measured = PatchValidation(labels, spacing_mm=(2.0, 0.5), batch_size=1, samples=range(1))
    measured.add(logits_of(found, labels), torch.from_numpy(there))
    assert measured.figures.hd95_mm == pytest.approx(2.0)


def test_surfaces_are_measured_on_the_first_patches_alone() -> None:
    labels = manager(LABELS)
    there = blobs(3, SURFACE_PATCHES)
    measured = PatchValidation(
        labels, spacing_mm=SPACING_MM, batch_size=SURFACE_PATCHES, samples=range(SURFACE_PATCHES)
    )
    measured.add(logits_of(there, labels), torch.from_numpy(there))
    before = measured.figures
    assert before.hd95_mm == 0.0
    measured.add(logits_of(np.zeros_like(there), labels), torch.from_numpy(there))
    assert measured.figures.hd95_mm == 0.0
    assert measured.figures.dice_per_class != before.dice_per_class


@pytest.mark.parametrize("size", [1, 3, 5, 34])
def test_as_many_patches_are_measured_whatever_the_size_of_a_batch(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    labels, measured = manager(LABELS), []
    monkeypatch.setattr(PatchValidation, "_measure", lambda _self, _logits, target: measured.append(target))
    found = PatchValidation(labels, spacing_mm=SPACING_MM, batch_size=size, samples=range(size))
    for _ in range(5):
        there = blobs(3, size)
        found.add(logits_of(there, labels), torch.from_numpy(there))
    assert len(measured) == SURFACE_PATCHES


def test_processes_that_share_batches_find_what_one_does() -> None:
    labels = manager(LABELS)
    there, found = blobs(1, 6), blobs(2, 6)
    logits, target = logits_of(found, labels), torch.from_numpy(there)
    alone = PatchValidation(labels, spacing_mm=SPACING_MM, batch_size=3, samples=range(3))
    parts = [PatchValidation(labels, spacing_mm=SPACING_MM, batch_size=3, samples=samples) for samples in ([0], [1, 2])]
    for start in (0, 3):
        alone.add(logits[start : start + 3], target[start : start + 3])
        parts[0].add(logits[start : start + 1], target[start : start + 1])
        parts[1].add(logits[start + 1 : start + 3], target[start + 1 : start + 3])
    sums: list[torch.Tensor] = []
    parts[1].join(lambda tensor: sums.append(tensor.clone()))
    parts[0].join(lambda tensor: tensor.add_(sums.pop(0)))
    assert parts[0].figures.dice_per_class == alone.figures.dice_per_class
    assert parts[0].figures.hd95_mm == pytest.approx(alone.figures.hd95_mm)
