"""Batches for training and online validation, made ahead by threads while the network is at work (torch).

A batch depends on the seed and its place (epoch, iteration) alone: the number of threads changes nothing, and a
training that was resumed sees what it would have seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.augmentation import UNCHANGED, augment_batch, draw_batch
from engine.augmentation_profile import AugmentationPlan, SampleDraw
from engine.preprocessed import PreprocessedCase, open_case
from engine.preprocessing import OUTSIDE
from engine.sampling import PatchSampler, central_bounds, read_patch

Batch = tuple[Tensor, Tensor]
"""Images (B, C, *patch) float32 and labels (B, *patch) int16, none negative."""


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """What batches are made of. `samples` are this process's indices into the batch of all processes; training draws
    augmentations, validation takes the middle of what the sampler chose."""

    folder: Path
    names: Sequence[str]
    sampler: PatchSampler
    plan: AugmentationPlan
    channels: int
    samples: Sequence[int]
    device: torch.device
    _opened: dict[str, PreprocessedCase] = field(default_factory=dict, init=False, repr=False, compare=False)

    def batch(self, epoch: int, iteration: int) -> Batch:
        """Raises DatasetInvalid when a case is not readable."""
        if self.sampler.stage == "training":
            draws = draw_batch(
                self.plan, self.channels, self.samples, seed=self.sampler.seed, epoch=epoch, iteration=iteration
            )
        else:
            draws = [UNCHANGED] * len(self.samples)
        images, labels = [], []
        for sample, draw in zip(self.samples, draws, strict=True):
            image, seg = self._read(epoch, iteration, sample, draw)
            images.append(image)
            labels.append(seg)
        return augment_batch(images, labels, draws, self.plan)

    def _read(self, epoch: int, iteration: int, sample: int, draw: SampleDraw) -> tuple[Tensor, Tensor]:
        case = self._case(self.names[self.sampler.case(epoch=epoch, iteration=iteration, sample=sample)])
        bounds = self.sampler.bounds(
            case.labels_ZYX.shape, case.locations, epoch=epoch, iteration=iteration, sample=sample
        )
        if not draw.is_spatial:
            bounds = central_bounds(bounds, self.plan.patch_size)
        image = read_patch(case.image_CZYX, bounds, 0)
        labels = read_patch(case.labels_ZYX[None], bounds, OUTSIDE)
        if len(self.plan.patch_size) == 2:
            image, labels = image[:, 0], labels[:, 0]
        return self._tensor(image), self._tensor(labels)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

    def _case(self, name: str) -> PreprocessedCase:
        # Two threads may open a case at once; one of the two is kept, and both are right.
        if name not in self._opened:
            self._opened[name] = open_case(self.folder, name)
        return self._opened[name]


class BatchStream:
    """The batches of an epoch in order, `ahead` of them in the making. To be closed, or used as a context."""

    def __init__(self, source: BatchSource, *, threads: int = 1, ahead: int = 3) -> None:
        self._source = source
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="batches")

    def epoch(self, epoch: int, iterations: int, *, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from iteration `first` on."""
        places = iter(range(first, iterations))
        waiting: deque[Future[Batch]] = deque(
            self._pool.submit(self._source.batch, epoch, iteration) for iteration in islice(places, self._ahead)
        )
        try:
            while waiting:
                batch = waiting.popleft().result()
                for iteration in islice(places, 1):
                    waiting.append(self._pool.submit(self._source.batch, epoch, iteration))
                yield batch
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
