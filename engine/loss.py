"""nnU-Net's training loss: soft Dice + cross-entropy for labels, soft Dice + binary cross-entropy for regions.

The values are those of nnU-Net 2.8 (`DC_and_CE_loss`, `DC_and_BCE_loss` with `MemoryEfficientSoftDiceLoss`). The
gradient is written out instead of recorded: softmax is computed once, no one-hot target is built, and the backward
pass reuses the memory of the probabilities. Sums are float32 whatever the logits are.

Shape legend: B batch, K heads, V voxels of a level, S spatial axes of the full resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from engine.labels import LabelManager

_SMOOTH = 1e-5


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """What this process has of the batch: this `part` of its samples. `add_up` adds a tensor of every process to that
    of this one, in place. The default is a process alone."""

    part: float = 1.0
    add_up: Callable[[Tensor], object] = lambda _tensor: None


WHOLE = BatchShare()


def deep_supervision_weights(outputs: int) -> tuple[float, ...]:
    """Weight of each output, full resolution first: halved from one to the next, the lowest 0, the sum 1.

    A network with a single output has weight 1 (nnU-Net divides 0 by 0 there). nnU-Net gives the lowest 1e-6 where
    several processes train, because torch's DDP waits for a gradient of every head; here none does.
    """
    weights = [0.5**level for level in range(outputs)]
    if outputs > 1:
        weights[-1] = 0.0
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def downsample_labels(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, *S) → (B, *shape), the voxel nearest to each centre: torch's `nearest-exact` without a detour by floats."""
    for axis, size in enumerate(shape, start=1):
        length = labels.shape[axis]
        if size != length:
            steps = torch.arange(size, device=labels.device)
            labels = labels.index_select(axis, ((2 * steps + 1) * length).div(2 * size, rounding_mode="floor"))
    return labels


class SegmentationLoss(nn.Module):
    """The loss of all outputs of a network.

    `weights` has one entry per output (`deep_supervision_weights`); outputs of weight 0 are not looked at. With
    `batch_dice` one Dice is computed over the batch, otherwise one per sample.

    Where several processes share a batch, the value is this process's part of the batch's loss: values and gradients of
    all processes add up to those of one process that has the whole batch, however the samples are divided.
    """

    def __init__(
        self, labels: LabelManager, *, batch_dice: bool, weights: Sequence[float], share: BatchShare = WHOLE
    ) -> None:
        super().__init__()
        if not any(weights):
            raise ValueError("at least one output needs a weight")
        self.weights = tuple(weights)
        self.batch_dice = batch_dice
        self.share = share
        self.ignore_label = labels.ignore_label
        self.regions: Tensor | None
        if labels.has_regions:
            inside = torch.zeros(len(labels.foreground), max(labels.values) + 2)
            for head, label in enumerate(labels.foreground):
                inside[head, list(label.region)] = 1.0
            self.register_buffer("regions", inside, persistent=False)
        else:
            self.regions = None

    def forward(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """`outputs`: logits (B, K, ...) of any float type, full resolution first. `labels`: whole numbers (B, *S), no
        negative ones. A scalar, 0-dim float32, down to -1 when good; its backward pass can run once. ValueError where
        outputs and weights differ in number."""
        if len(outputs) != len(self.weights):
            raise ValueError(f"{len(outputs)} outputs for {len(self.weights)} weights")
        total = torch.zeros((), device=labels.device)
        for weight, logits in zip(self.weights, outputs, strict=True):
            if weight:
                total = total + weight * self._level(logits, downsample_labels(labels, logits.shape[2:]))
        return total

    def _level(self, logits: Tensor, labels: Tensor) -> Tensor:
        labels = labels.flatten(1)
        annotated = None if self.ignore_label is None else labels != self.ignore_label
        if annotated is not None:
            labels = labels * annotated
        kind: Any = _LabelLoss if self.regions is None else _RegionLoss
        loss: Tensor = kind.apply(logits, labels, annotated, self.batch_dice, self.share, self.regions)
        return loss


class _Dice(NamedTuple):
    """This process's part of the mean soft Dice, and the mean's derivative by the probability of a voxel: `everywhere`
    and `inside` more where the voxel belongs to the class. Both (B, K) or, with batch Dice, (1, K)."""

    mean: Tensor
    inside: Tensor
    everywhere: Tensor


def _soft_dice(intersection: Tensor, predicted: Tensor, expected: Tensor, batch_dice: bool, share: BatchShare) -> _Dice:
    """From sums (B, K) over voxels."""
    samples = share.part
    if batch_dice:
        sums = torch.stack((intersection, predicted, expected)).sum(1, keepdim=True)
        share.add_up(sums)
        intersection, predicted, expected = sums
        samples = 1.0  # the sums are the batch's, and so is the Dice that a voxel of this process changes
    numerator = 2 * intersection + _SMOOTH
    denominator = (expected + predicted + _SMOOTH).clamp_min(1e-8)
    each = samples / numerator.numel()
    return _Dice(
        mean=(numerator / denominator).mean() * share.part,
        inside=2 * each / denominator,
        everywhere=-each * numerator / denominator.square(),
    )


def _annotated_voxels(annotated: Tensor, share: BatchShare) -> Tensor:
    """Of the whole batch; at least 1."""
    voxels = annotated.sum()
    share.add_up(voxels)
    return voxels.clamp_min(1).to(torch.float32)


class _LabelLoss(torch.autograd.Function):
    """Cross-entropy minus Dice of the foreground labels."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        annotated: Tensor | None,
        batch_dice: bool,
        share: BatchShare,
        regions: None,
    ) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            # log_p first: the entropy of a voxel that is far off stays finite and exact.
            log_p = logits.to(torch.float32, memory_format=torch.contiguous_format).flatten(2).log_softmax(1)
            entropy = log_p.gather(1, labels.long()[:, None])[:, 0].neg_()
            p = log_p.exp_()
            sums = p.new_zeros(3, p.shape[0], p.shape[1])
            is_label, hit = torch.empty_like(entropy), torch.empty_like(entropy)
            for label in range(1, p.shape[1]):
                torch.eq(labels, label, out=is_label)
                if annotated is not None:
                    is_label.mul_(annotated)
                torch.mul(is_label, p[:, label], out=hit)
                sums[0, :, label], sums[2, :, label] = hit.sum(1), is_label.sum(1)
                seen = p[:, label] if annotated is None else torch.mul(p[:, label], annotated, out=hit)
                sums[1, :, label] = seen.sum(1)
            dice = _soft_dice(sums[0, :, 1:], sums[1, :, 1:], sums[2, :, 1:], batch_dice, share)
            if annotated is None:
                voxels = p.new_full((), entropy.numel() / share.part)
                cross_entropy = entropy.mean() * share.part
            else:
                voxels = _annotated_voxels(annotated, share)
                cross_entropy = (entropy * annotated).sum() / voxels
        ctx.p, ctx.labels, ctx.annotated, ctx.dice, ctx.voxels = p, labels, annotated, dice, voxels
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return cross_entropy - dice.mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(upstream.device.type, enabled=False):
            p, ctx.p = ctx.p, None
            # Through the softmax: p_k (g_k - sum_j g_j p_j) with g the derivative of -Dice by p, which is 0 for the
            # background and has two values for a label; cross-entropy adds (p_k - is_k) / voxels.
            each = upstream / ctx.voxels
            everywhere, inside = -upstream * ctx.dice.everywhere, -upstream * ctx.dice.inside
            shared = each.expand_as(p[:, 0]).clone()
            is_label, pull = torch.empty_like(shared), torch.empty_like(shared)
            for label in range(1, p.shape[1]):
                head = slice(label - 1, label)
                torch.eq(ctx.labels, label, out=is_label)
                torch.addcmul(everywhere[:, head], is_label, inside[:, head], out=pull)
                shared.addcmul_(pull, p[:, label], value=-1)
            for label in range(p.shape[1]):
                torch.eq(ctx.labels, label, out=is_label)
                if label:
                    head = slice(label - 1, label)
                    torch.addcmul(everywhere[:, head], is_label, inside[:, head], out=pull)
                    p[:, label].mul_(pull.add_(shared))
                else:
                    p[:, label].mul_(shared)
                p[:, label].sub_(is_label.mul_(each))
                if ctx.annotated is not None:
                    p[:, label].mul_(ctx.annotated)
        return p.view(ctx.shape).to(ctx.dtype), None, None, None, None, None


class _RegionLoss(torch.autograd.Function):
    """Binary cross-entropy minus Dice of all regions."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        annotated: Tensor | None,
        batch_dice: bool,
        share: BatchShare,
        regions: Tensor,
    ) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            z = logits.to(torch.float32, memory_format=torch.contiguous_format).flatten(2)
            inside = regions[:, labels.long()].transpose(0, 1)
            entropy = functional.binary_cross_entropy_with_logits(z, inside, reduction="none")
            p = z.sigmoid()
            if annotated is None:
                dice = _soft_dice((p * inside).sum(2), p.sum(2), inside.sum(2), batch_dice, share)
                voxels = p.new_full((), entropy.numel() / share.part)
                cross_entropy = entropy.mean() * share.part
            else:
                mask = annotated[:, None]
                dice = _soft_dice(
                    (p * inside * mask).sum(2), (p * mask).sum(2), (inside * mask).sum(2), batch_dice, share
                )
                # nnU-Net divides by annotated voxels, not by voxels times regions.
                voxels = _annotated_voxels(annotated, share)
                cross_entropy = (entropy * mask).sum() / voxels
        ctx.p, ctx.inside, ctx.annotated, ctx.dice, ctx.voxels = p, inside, annotated, dice, voxels
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return cross_entropy - dice.mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(upstream.device.type, enabled=False):
            p, ctx.p = ctx.p, None
            gradient = torch.addcmul(ctx.dice.everywhere[:, :, None], ctx.inside, ctx.dice.inside[:, :, None])
            gradient.mul_(p).mul_(1 - p).neg_()
            gradient.add_((p - ctx.inside) / ctx.voxels).mul_(upstream)
            if ctx.annotated is not None:
                gradient.mul_(ctx.annotated[:, None])
        return gradient.view(ctx.shape).to(ctx.dtype), None, None, None, None, None
