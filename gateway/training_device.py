"""Where a training runs: device, precision, and its processes, from what the command line says and what is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from engine.errors import TrainingRefused

if TYPE_CHECKING:
    import torch

    from engine.step_gradients import Precision
    from engine.training_processes import TrainingProcesses

DeviceName = Literal["auto", "cpu", "cuda"]
PrecisionName = Literal["auto", "float32", "bf16", "fp16"]

_EXTRA = frozenset({"torch", "onnx", "matplotlib"})


@contextmanager
def training_packages() -> Iterator[None]:
    """Around imports. Raises TrainingRefused, with what to do, for a package of the extra `train` that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name in _EXTRA:
            raise TrainingRefused(
                f"training needs the Python package {error.name}: install seggate with the extra `train` (make install "
                "EXTRAS=train)"
            ) from error
        raise


def chosen_device(name: DeviceName) -> torch.device:
    """Of several processes on GPUs each has its own. Raises TrainingRefused for one that is not there."""
    with training_packages():
        import torch

        from engine.training_processes import place_of
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not there:
        raise TrainingRefused("--device cuda: torch finds no GPU here")
    if name == "cpu" or not there:
        return torch.device("cpu")
    place = place_of(os.environ)
    if place.local_size > there:
        raise TrainingRefused(f"{place.local_size} processes need a GPU each, and there are {there}")
    return torch.device("cuda", place.local_rank)


def chosen_precision(name: PrecisionName, device: torch.device) -> Precision:
    """Raises TrainingRefused where the device cannot train in it."""
    from engine.training_setup import default_precision

    if name == "fp16" and device.type != "cuda":
        raise TrainingRefused("--precision fp16 needs a GPU; a processor trains in bf16 or float32")
    return default_precision(device) if name == "auto" else name


def set_threads(threads: int | None, device: torch.device) -> None:
    """Torch's threads in this process: as asked for, or the cores evenly between the processes on them."""
    import torch

    from engine.training_processes import place_of

    place = place_of(os.environ)
    if threads is None and device.type == "cpu" and place.local_size > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // place.local_size)
    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def training_processes(name: DeviceName) -> Iterator[TrainingProcesses]:
    """Those that were started together with this one. Raises TrainingRefused when they do not find each other."""
    device = chosen_device(name)
    from engine.training_processes import joined_processes

    with joined_processes(on_gpus=device.type == "cuda") as processes:
        yield processes
