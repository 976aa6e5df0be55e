"""The processes that train one network together: their shares of a batch, and how they agree (torch.distributed).

torchrun, or gateway/training_launcher.py, starts N processes that run the same program. A batch is made from a
counter-based random state (engine/random_state.py), so process r makes its samples of the batch that one process would
have; gradients are added up, every process does the same step, and process 0 alone writes.

What is decided by time or by a signal is decided once for all: no process may leave a loop that the others stay in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from engine.errors import TrainingRefused, WorkerDied

RENDEZVOUS = "SEGGATE_RENDEZVOUS"
"""Environment variable: a file:// URL where the processes meet; without it as torchrun says (MASTER_ADDR and so on)."""
STEP_TIMEOUT_S = 1800.0
# What one process does alone (preprocessing, a large case) takes as long as it takes; a process that dies is noticed
# at once, by its closed connection.
_LONGEST_WAIT = timedelta(days=30)

Plain = TypeVar("Plain")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which process of how many this is, in all and on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def place_of(environment: Mapping[str, str]) -> Place:
    """From torchrun's variables; a process alone where they are absent."""
    rank, size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    return Place(
        rank=rank,
        size=size,
        local_rank=int(environment.get("LOCAL_RANK", rank)),
        local_size=int(environment.get("LOCAL_WORLD_SIZE", size)),
    )


class TrainingProcesses:
    """This process among those that train together; alone by default, and then nothing waits for anybody.

    Every method but `share` and the properties is called by all processes in the same order. Each raises WorkerDied
    when another process has ended, or does not answer in time.
    """

    def __init__(self, place: Place | None = None, *, on_gpus: bool = False, timeout_s: float = STEP_TIMEOUT_S) -> None:
        """With more than one process torch.distributed must have been started (`joined_processes`)."""
        self.place = place or Place()
        self._step: Any = None
        self._wait: Any = None
        self._gpu: Any = None
        if self.size > 1:
            timeout = timedelta(seconds=timeout_s)
            self._step = distributed.new_group(backend="gloo", timeout=timeout)
            self._wait = distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)
            self._gpu = distributed.new_group(backend="nccl", timeout=timeout) if on_gpus else None

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.place.size

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, batch_size: int) -> range:
        """This process's samples of a batch: as even as it goes, every sample in one process. Raises TrainingRefused
        when there are not enough."""
        if batch_size < self.size:
            raise TrainingRefused(
                f"a batch of {batch_size} cannot be shared by {self.size} processes; use at most {batch_size}"
            )
        return range(self.rank * batch_size // self.size, (self.rank + 1) * batch_size // self.size)

    def add_up(self, tensor: Tensor) -> None:
        """Adds the tensor of every process to this one's, in place."""
        if self.size > 1:
            with _others_answer():
                distributed.all_reduce(tensor, group=self._gpu if tensor.is_cuda else self._step)

    def join_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> float:
        """Adds up gradients, in place, and the loss, which is returned. Parameters without a gradient have none in any
        process."""
        if self.size == 1:
            return float(loss)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # One message: their number costs more than their size.
        flat = torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
        self.add_up(flat)
        start = 1
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view(gradient.shape))
            start += gradient.numel()
        return float(flat[0])

    def agreed(self, question: Callable[[], bool]) -> Callable[[], bool]:
        """The question as all ask it together: True when any process says so."""
        if self.size == 1:
            return question

        def ask() -> bool:
            answer = torch.tensor([int(question())])
            self.add_up(answer)
            return bool(answer)

        return ask

    def first_number(self, value: float) -> float:
        """The number that process 0 has."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        with _others_answer():
            distributed.broadcast(shared, 0, group=self._step)
        return float(shared)

    def on_first(self, work: Callable[[], Plain]) -> Plain:
        """What `work` returns in process 0, where alone it runs while the others wait: values that JSON has."""
        if self.size == 1:
            return work()
        content = json.dumps(work()).encode() if self.is_first else b""
        length = torch.tensor([len(content)])
        with _others_answer():
            distributed.broadcast(length, 0, group=self._wait)
            data = _bytes_tensor(content, int(length))
            distributed.broadcast(data, 0, group=self._wait)
        result: Plain = json.loads(bytes(data.tolist()))
        return result

    def gather(self, value: Plain) -> list[Plain]:
        """The values of all processes, in their order; values that JSON has. Waits for the slowest."""
        if self.size == 1:
            return [value]
        content = json.dumps(value).encode()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _others_answer():
            distributed.all_gather(lengths, torch.tensor([len(content)]), group=self._wait)
            longest = max(int(length) for length in lengths)
            parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            distributed.all_gather(parts, _bytes_tensor(content, longest), group=self._wait)
        return [json.loads(bytes(part[: int(length)].tolist())) for part, length in zip(parts, lengths, strict=True)]

    def part_of(self, work: Sequence[Plain]) -> Sequence[Plain]:
        """This process's share of what is done one by one."""
        return work[self.rank :: self.size]

    def in_order(self, parts: Sequence[Sequence[Plain]]) -> list[Plain]:
        """What every process made of its `part_of`, in the order of the whole; some may have stopped early."""
        longest = max(len(part) for part in parts)
        return [part[index] for index in range(longest) for part in parts if index < len(part)]


@contextmanager
def joined_processes(*, on_gpus: bool, timeout_s: float = STEP_TIMEOUT_S) -> Iterator[TrainingProcesses]:
    """This process among those that were started with it, until the block ends; alone where nobody was.

    Gradients on GPUs go through NCCL, everything else through gloo. `timeout_s`: how long a process may be late for a
    step. Raises TrainingRefused when the processes do not find each other.
    """
    place = place_of(os.environ)
    if place.size == 1:
        yield TrainingProcesses(place)
        return
    if on_gpus:
        torch.cuda.set_device(place.local_rank)
    try:
        distributed.init_process_group(
            "gloo",
            init_method=os.environ.get(RENDEZVOUS, "env://"),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingRefused(f"the {place.size} processes do not find each other: {_first_line(error)}") from error
    yield TrainingProcesses(place, on_gpus=on_gpus, timeout_s=timeout_s)
    # Not after an error: the others would wait in it, and this process ends anyway.
    distributed.destroy_process_group()


@contextmanager
def _others_answer() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # What torch says names addresses and its own source files; it stays in the traceback of a log.
        raise WorkerDied(
            "another process of this training has ended, or does not answer; what it said itself stands apart. The "
            "last checkpoint is kept, and the same command goes on from it"
        ) from error


def _bytes_tensor(content: bytes, length: int) -> Tensor:
    data = torch.zeros(length, dtype=torch.uint8)
    if content:
        data[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return data


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
