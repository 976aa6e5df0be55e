"""engine.loss: nnU-Net's values, the gradient of the plain formula, and the guards nnU-Net lacks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from engine.labels import LabelManager  # noqa: E402
from engine.loss import BatchShare, SegmentationLoss, deep_supervision_weights, downsample_labels  # noqa: E402

_DATASETS: dict[str, dict[str, Any]] = {
    "labels": {"labels": {"background": 0, "a": 1, "b": 2}},
    "labels, ignore": {"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}},
    "regions": {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]},
    "regions, ignore": {
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "regions_class_order": [1, 2],
    },
}
LABELS = {name: LabelManager.from_dataset_json(document) for name, document in _DATASETS.items()}
SIZES = ((8, 12, 4), (4, 6, 4), (2, 3, 2))

# Computed by nnunetv2 2.8.1 on the inputs below: DC_and_CE_loss / DC_and_BCE_loss with MemoryEfficientSoftDiceLoss,
# smooth 1e-5, in its DeepSupervisionWrapper, targets by its DownsampleSegForDSTransform.
NNUNET = {
    ("labels", False, 1): 2.26160932,
    ("labels", False, 3): 1.86302471,
    ("labels", True, 1): 2.26160431,
    ("labels", True, 3): 1.86292315,
    ("labels, ignore", False, 1): 2.25542068,
    ("labels, ignore", False, 3): 1.83490634,
    ("labels, ignore", True, 1): 2.25542593,
    ("labels, ignore", True, 3): 1.83544779,
    ("regions", False, 1): 0.67774987,
    ("regions", False, 3): 0.61203027,
    ("regions", True, 1): 0.67774725,
    ("regions", True, 3): 0.61256230,
    ("regions, ignore", False, 1): 1.82373667,
    ("regions, ignore", False, 3): 1.82359958,
    ("regions, ignore", True, 1): 1.82373118,
    ("regions, ignore", True, 3): 1.82240367,
}


def _inputs(labels: LabelManager, levels: int) -> tuple[list[Tensor], Tensor]:
    heads, values = labels.num_heads, len(labels.values) + (labels.ignore_label is not None)
    index = torch.arange(2 * 8 * 12 * 4, dtype=torch.float64)
    target = (index * 7919 % 13 % values).to(torch.int16).reshape(2, *SIZES[0])
    outputs = []
    for level, size in enumerate(SIZES[:levels]):
        index = torch.arange(2 * heads * torch.Size(size).numel(), dtype=torch.float64)
        outputs.append((3 * torch.sin(index * (0.37 + level))).to(torch.float32).reshape(2, heads, *size))
    return outputs, target


def _loss(name: str, *, batch_dice: bool, levels: int) -> SegmentationLoss:
    return SegmentationLoss(LABELS[name], batch_dice=batch_dice, weights=deep_supervision_weights(levels))


def _plainly(logits: Tensor, target: Tensor, labels: LabelManager, batch_dice: bool) -> Tensor:
    """The formula, with one-hot targets and recorded gradients."""
    mask = torch.ones_like(target[:, None]) if labels.ignore_label is None else (target != labels.ignore_label)[:, None]
    if labels.has_regions:
        inside = torch.stack([torch.isin(target, torch.tensor(r.region)) for r in labels.foreground], 1).float()
        entropy = functional.binary_cross_entropy_with_logits(logits, inside, reduction="none")
        entropy = (entropy * mask).sum() / (mask.sum() * (labels.num_heads if labels.ignore_label is None else 1))
        p = logits.sigmoid()
    else:
        values = torch.where(mask[:, 0] > 0, target, 0).long()
        inside = functional.one_hot(values, labels.num_heads).movedim(-1, 1).float()
        entropy = -(logits.log_softmax(1) * inside * mask).sum() / mask.sum()
        p, inside = logits.softmax(1)[:, 1:], inside[:, 1:]
    axes = (0, 2, 3, 4) if batch_dice else (2, 3, 4)
    dice = (2 * (p * inside * mask).sum(axes) + 1e-5) / ((p + inside) * mask).sum(axes).add(1e-5)
    return entropy - dice.mean()


@pytest.mark.requirement("ART-08")
@pytest.mark.parametrize(("name", "batch_dice", "levels"), NNUNET)
def test_the_value_is_that_of_nnunet(name: str, batch_dice: bool, levels: int) -> None:
    outputs, target = _inputs(LABELS[name], levels)
    value = _loss(name, batch_dice=batch_dice, levels=levels)(outputs, target)
    assert value.item() == pytest.approx(NNUNET[name, batch_dice, levels], abs=1e-6)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("name", LABELS)
def test_the_gradient_is_that_of_the_formula(name: str, batch_dice: bool) -> None:
    outputs, target = _inputs(LABELS[name], 1)
    ours, theirs = (outputs[0].clone().requires_grad_() for _ in range(2))
    _loss(name, batch_dice=batch_dice, levels=1)([ours], target).mul(3.0).backward()
    _plainly(theirs, target, LABELS[name], batch_dice).mul(3.0).backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", LABELS)
def test_bfloat16_logits_in_any_memory_format_are_summed_in_float32(name: str) -> None:
    outputs, target = _inputs(LABELS[name], 1)
    half = outputs[0].bfloat16().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    criterion = _loss(name, batch_dice=True, levels=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = criterion([half], target)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(criterion([half.detach().float()], target).item(), abs=1e-6)
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["labels, ignore", "regions, ignore"])
def test_a_batch_without_an_annotated_voxel_has_no_gradient(name: str) -> None:
    logits = _inputs(LABELS[name], 1)[0][0].requires_grad_()
    value = _loss(name, batch_dice=True, levels=1)([logits], torch.full((2, *SIZES[0]), 3))
    value.backward()
    assert value.item() == pytest.approx(-1.0)
    assert logits.grad is not None
    assert not logits.grad.any()


def test_logits_far_off_keep_an_exact_and_finite_value() -> None:
    logits = torch.zeros(1, 3, 2, 2, 2)
    logits[:, 0] = 300.0
    value = _loss("labels", batch_dice=True, levels=1)([logits], torch.ones(1, 2, 2, 2, dtype=torch.int16))
    # Dice: label 1 is missed whole, label 2 is on neither side and counts as 1.
    assert value.item() == pytest.approx(300.0 - 0.5)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("name", LABELS)
def test_the_parts_of_several_processes_add_up_to_the_loss_of_one(name: str, batch_dice: bool) -> None:
    """A batch of three: this process has the first sample, another one two; values and gradients are added up."""
    labels = LABELS[name]
    outputs, target = _inputs(labels, 1)
    logits, target = torch.cat([outputs[0], outputs[0].flip(2)[:1]]), torch.cat([target, target.flip(2)[:1]])
    whole = logits.clone().requires_grad_()
    expected = _loss(name, batch_dice=batch_dice, levels=1)([whole], target)
    expected.backward()

    weights = deep_supervision_weights(1)
    said: list[list[Tensor]] = []
    for samples in (slice(0, 1), slice(1, 3)):
        heard: list[Tensor] = []
        share = BatchShare(part=len(range(3)[samples]) / 3, add_up=lambda t, heard=heard: heard.append(t.clone()))  # type: ignore[misc]
        SegmentationLoss(labels, batch_dice=batch_dice, weights=weights, share=share)(
            [logits[samples]], target[samples]
        )
        said.append(heard)

    total = 0.0
    for samples, others in ((slice(0, 1), said[1]), (slice(1, 3), said[0])):
        waiting = iter(others)
        share = BatchShare(part=len(range(3)[samples]) / 3, add_up=lambda t, waiting=waiting: t.add_(next(waiting)))  # type: ignore[misc]
        part = logits[samples].clone().requires_grad_()
        value = SegmentationLoss(labels, batch_dice=batch_dice, weights=weights, share=share)([part], target[samples])
        value.backward()
        total += value.item()
        assert whole.grad is not None
        assert part.grad is not None
        torch.testing.assert_close(part.grad, whole.grad[samples], rtol=1e-4, atol=1e-8)
    assert total == pytest.approx(expected.item(), abs=1e-6)


def test_weights_halve_and_the_lowest_is_left_out() -> None:
    assert deep_supervision_weights(5) == pytest.approx((8 / 15, 4 / 15, 2 / 15, 1 / 15, 0.0))
    assert deep_supervision_weights(2) == (1.0, 0.0)
    assert deep_supervision_weights(1) == (1.0,)


def test_targets_are_the_nearest_voxels_as_torch_finds_them() -> None:
    labels = torch.randint(0, 100, (2, 20, 24, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    for shape in ((10, 24, 4), (5, 6, 12), (7, 9, 5)):
        expected = functional.interpolate(labels[:, None].float(), shape, mode="nearest-exact")[:, 0]
        assert torch.equal(downsample_labels(labels, shape), expected.to(torch.int16))


def test_outputs_that_do_not_fit_the_weights_are_refused() -> None:
    outputs, target = _inputs(LABELS["labels"], 2)
    with pytest.raises(ValueError, match="2 outputs for 3 weights"):
        _loss("labels", batch_dice=False, levels=3)(outputs, target)
    with pytest.raises(ValueError, match="at least one"):
        SegmentationLoss(LABELS["labels"], batch_dice=False, weights=(0.0,))
