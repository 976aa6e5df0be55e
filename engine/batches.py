"""Batches for training and online validation, made ahead by threads while the network is at work (torch).

A batch depends on the seed and its place (epoch, iteration) alone: the number of threads changes nothing, and a
training that was resumed sees what it would have seen.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.augmentation import UNCHANGED, augment_batch, draw_batch
from engine.augmentation_profile import AugmentationPlan, SampleDraw
from engine.errors import DatasetInvalid
from engine.labels import LabelManager
from engine.preprocessed import PreprocessedCase, open_case
from engine.preprocessing import OUTSIDE
from engine.sampling import Bounds, PatchSampler, central_bounds, read_patch
from engine.stage_predictions import PreviousStage

Batch = tuple[Tensor, Tensor]
"""Images (B, C, *patch) float32, in a cascade with the previous stage's channels after their own, and labels
(B, *patch) int16, none negative."""

AHEAD = 3
"""Batches that are made, or in the making, before they are asked for."""
_OPEN_CASES = 200  # each has two files mapped, or three in a cascade, and a process may have about a thousand


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """What batches are made of. `samples` are this process's indices into the batch of all processes; training draws
    augmentations, validation takes the middle of what the sampler chose. `channels` are the image's own; `previous` has
    the label maps whose labels (`plan.previous_labels`) become channels in a cascade."""

    folder: Path
    names: Sequence[str]
    labels: LabelManager
    sampler: PatchSampler
    plan: AugmentationPlan
    channels: int
    samples: Sequence[int]
    device: torch.device
    previous: PreviousStage | None = None
    _open: Callable[[str], PreprocessedCase] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kept = _OPEN_CASES if self.previous is None else max(1, _OPEN_CASES * 2 // 3)
        object.__setattr__(self, "_open", lru_cache(kept)(self._open_case))

    def batch(self, epoch: int, iteration: int) -> Batch:
        """Raises DatasetInvalid when a case, or its previous stage, is not readable or does not fit."""
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

    def label_patch(self, *, epoch: int, iteration: int, sample: int) -> NDArray[np.int16]:
        """The middle of a sample's label map (z, y, x) as stored, without augmentation; none negative. `sample` is any
        of the batch of all processes. Raises DatasetInvalid."""
        case, bounds = self._place(epoch, iteration, sample)
        patch = read_patch(case.labels_1ZYX, central_bounds(bounds, self.plan.patch_size), 0, np.int32)
        self._check_labels(case.name, patch)  # before a large value becomes a small one
        labels: NDArray[np.int16] = np.maximum(patch[0], 0).astype(np.int16)
        return labels

    def _place(self, epoch: int, iteration: int, sample: int) -> tuple[PreprocessedCase, Bounds]:
        case = self._open(self.names[self.sampler.case(epoch=epoch, iteration=iteration, sample=sample)])
        return case, self.sampler.bounds(
            case.labels_1ZYX.shape[1:], case.locations, epoch=epoch, iteration=iteration, sample=sample
        )

    def _read(self, epoch: int, iteration: int, sample: int, draw: SampleDraw) -> tuple[Tensor, Tensor]:
        case, bounds = self._place(epoch, iteration, sample)
        if not draw.is_spatial:
            bounds = central_bounds(bounds, self.plan.patch_size)
        image = read_patch(case.image_CZYX, bounds, 0)
        labels = read_patch(case.labels_1ZYX, bounds, OUTSIDE)
        self._check_labels(case.name, labels)
        if case.previous_1ZYX is not None:
            before = read_patch(case.previous_1ZYX, bounds, OUTSIDE, labels.dtype)
            labels = np.concatenate([labels, before])
        if len(self.plan.patch_size) == 2:
            image, labels = image[:, 0], labels[:, 0]
        return self._tensor(image), self._tensor(labels)

    def _check_labels(self, name: str, labels: NDArray[Any]) -> None:
        """What was preprocessed elsewhere was not checked there, and a wrong class ends torch without a word of it."""
        low, high = int(labels.min()), int(labels.max())
        if low < OUTSIDE or high > self.labels.highest_value:
            raise DatasetInvalid(
                f"{self.folder.name}/{name}: holds label {high if high > self.labels.highest_value else low}; declared "
                f"are 0 to {self.labels.highest_value}. Correct its label map or dataset.json, remove the case's files "
                "from this folder, and preprocess the dataset again"
            )

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        # Only from pinned memory is a copy to a GPU asynchronous.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _open_case(self, name: str) -> PreprocessedCase:
        case = open_case(self.folder, name, self.labels)
        if case.image_CZYX.shape[0] != self.channels:
            raise DatasetInvalid(
                f"{self.folder.name}/{name}: {case.image_CZYX.shape[0]} channel(s) where the network takes "
                f"{self.channels}; preprocess the dataset with these plans"
            )
        if self.previous is None:
            return case
        return replace(case, previous_1ZYX=self.previous.open(name, case.labels_1ZYX.shape[1:]))


class BatchStream:
    """The batches of an epoch in order, `ahead` of them in the making by `threads`. To be closed, or used as a context.

    With 0 threads each batch is made when it is asked for. On a GPU each thread has a stream of its own, so that it
    never waits for the network's step.
    """

    def __init__(self, source: BatchSource, *, threads: int = 1, ahead: int = AHEAD) -> None:
        self._source = source
        self._ahead = ahead
        self._streams = threading.local()
        self._gpu = source.device.index
        if source.device.type == "cuda" and self._gpu is None:
            self._gpu = torch.cuda.current_device()  # of this thread, which another one does not share
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="batches") if threads else None

    def epoch(self, epoch: int, iterations: int, *, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from iteration `first` on."""
        places = iter(range(first, iterations))
        if self._pool is None:
            for iteration in places:
                yield self._source.batch(epoch, iteration)
            return
        waiting: deque[Future[Batch]] = deque(
            self._pool.submit(self._make, epoch, iteration) for iteration in islice(places, self._ahead)
        )
        try:
            while waiting:
                batch = waiting.popleft().result()
                for iteration in islice(places, 1):
                    waiting.append(self._pool.submit(self._make, epoch, iteration))
                for tensor in batch:
                    if tensor.is_cuda:  # its memory must not be used again before the network's stream is done with it
                        tensor.record_stream(torch.cuda.current_stream(tensor.device))
                yield batch
        finally:
            for future in waiting:
                future.cancel()

    def _make(self, epoch: int, iteration: int) -> Batch:
        """In a thread."""
        device = self._source.device
        if device.type != "cuda":
            return self._source.batch(epoch, iteration)
        if not hasattr(self._streams, "own"):
            torch.cuda.set_device(self._gpu)
            self._streams.own = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams.own):
            batch = self._source.batch(epoch, iteration)
        self._streams.own.synchronize()
        return batch

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
