"""What a training step takes in memory: measured on the device that is there, beside nnU-Net's estimate (torch).

A probe runs a few real steps (forward, loss, backward, optimiser) on made-up images of the planned patch and batch: on
a GPU in this process, on a processor in a child that may not take more than what is free.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import platform
import resource
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from engine.allocator import freed_memory_kept
from engine.augmentation import augment_batch
from engine.augmentation_profile import SampleDraw
from engine.batches import AHEAD, Batch
from engine.errors import MemoryExceeded
from engine.memory import available_bytes
from engine.planners import PLANNERS, Planner
from engine.planning import REFERENCE_BATCH
from engine.plans import Configuration
from engine.topology import Topology, feature_map_voxels
from engine.training import Trainer
from engine.training_setup import TrainingSetup

_STEPS = 3  # the optimiser's momentum is there from the second on
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """One probe. `peak_bytes` is None where the step did not fit; `available_bytes` was free for it, of `total_bytes`;
    on a processor both are what was free. `estimate_bytes` is nnU-Net's own figure for this patch and batch."""

    device: str
    precision: str
    patch_size: tuple[int, ...]
    batch_size: int
    peak_bytes: int | None
    available_bytes: int
    total_bytes: int
    estimate_bytes: int

    @property
    def fits(self) -> bool:
        return self.peak_bytes is not None and self.peak_bytes <= self.available_bytes

    def fills_at_most(self, share: float) -> bool:
        """Whether the device, with what others have of it, is not filled beyond this share of it."""
        taken = self.total_bytes - self.available_bytes
        return self.peak_bytes is not None and taken + self.peak_bytes <= share * self.total_bytes

    def as_plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> StepMemory:
        return cls(**{**plain, "patch_size": tuple(plain["patch_size"])})

    def __str__(self) -> str:
        peak = "more than there is" if self.peak_bytes is None else f"{self.peak_bytes / _MIB:,.0f} MiB"
        return (
            f"a step of {self.batch_size} x {' x '.join(map(str, self.patch_size))} in {self.precision} takes {peak}; "
            f"{self.available_bytes / _MIB:,.0f} of {self.total_bytes / _MIB:,.0f} MiB are free on {self.device}; "
            f"nnU-Net's estimate is {self.estimate_bytes / _MIB:,.0f} MiB"
        )


def measure_step(setup: TrainingSetup, *, label_entries: int, planner: str | None = None, alike: int = 1) -> StepMemory:
    """The peak of a step of `setup` as one process does it, with its batches made ahead. Of the setup's files none is
    read. `label_entries` counts dataset.json's labels with background and ignore, `planner` is the plans'
    `experiment_planner_used`; both are for the estimate. `alike` processes will share a processor's memory."""
    configuration = setup.configuration
    if setup.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        name = torch.cuda.get_device_name(setup.device)
        available, total = torch.cuda.mem_get_info(setup.device)
        peak = _peak_on_gpu(setup)
    else:
        name = f"the processor ({platform.machine()})"
        available = total = available_bytes() // alike
        peak = _peak_in_child(setup, available)
    return StepMemory(
        device=name,
        precision=setup.precision,
        patch_size=configuration.patch_size,
        batch_size=configuration.batch_size,
        peak_bytes=peak,
        available_bytes=available,
        total_bytes=total,
        estimate_bytes=nnunet_estimate_bytes(configuration, label_entries=label_entries, planner=planner),
    )


def check_step(memory: StepMemory) -> None:
    """Raises MemoryExceeded, with the numbers and what to do, where the step does not fit."""
    if memory.fits:
        return
    needed = memory.peak_bytes or 2 * memory.available_bytes
    # nnU-Net's own measure, scaled by what was found; 10 % are left for what else comes.
    gigabytes = 0.9 * memory.estimate_bytes * memory.available_bytes / needed / 1e9
    advice = [f"plan for less with `seggate plan --gpu-memory-gb {max(1.0, math.floor(10 * gigabytes) / 10):g}`"]
    if memory.precision == "float32":
        advice.append("train in half precision (--precision)")
    if memory.batch_size > 1:
        advice.append("share the batch between several devices (--devices)")
    raise MemoryExceeded(f"{memory}: {'; or '.join(advice)}; --no-probe trains all the same")


def nnunet_estimate_bytes(configuration: Configuration, *, label_entries: int, planner: str | None = None) -> int:
    """What nnU-Net's planner assumes for this patch and batch: the values in all feature maps (`feature_map_voxels`),
    on the scale on which its reference fills its GPU."""
    architecture = configuration.architecture
    known = _planner(planner, architecture.network)
    values = feature_map_voxels(
        architecture.network,
        Topology(
            patch_size=configuration.patch_size,
            strides=architecture.strides,
            kernel_sizes=architecture.kernel_sizes,
        ),
        features_per_stage=architecture.features_per_stage,
        blocks_per_stage=architecture.n_conv_per_stage,
        convs_per_decoder_stage=tuple(reversed(architecture.n_conv_per_stage_decoder)),
        num_outputs=label_entries,
    )
    dimensions = len(configuration.patch_size)
    reference = known.reference_2d if dimensions == 2 else known.reference_3d
    batches = configuration.batch_size / REFERENCE_BATCH[dimensions]
    return int(values * batches / reference * known.reference_gb * 1e9)


def _planner(name: str | None, network: str) -> Planner:
    """The planner of that name, or the first for that kind of network."""
    of_kind = [planner for planner in PLANNERS.values() if planner.network == network]
    return next((planner for planner in of_kind if planner.name == name), of_kind[0])


def run_steps(setup: TrainingSetup, folder: Path) -> None:
    """Some training steps on made-up batches; `folder` stays empty."""
    trainer = Trainer(replace(setup, compile="off", start=None), folder)
    inputs = int(next(trainer.network.parameters()).shape[1])
    batches = _batches_ahead(setup, inputs)
    for _ in range(_STEPS):
        trainer.step(batches[0])


def _batches_ahead(setup: TrainingSetup, inputs: int) -> list[Batch]:
    """As the loader has them: in a GPU's memory each of its threads works on a stream with a cache of its own."""
    if setup.device.type != "cuda" or not setup.loader_threads:
        return [_made_up_batch(setup, inputs)]
    batches = []
    for _ in range(setup.loader_threads):
        with torch.cuda.stream(torch.cuda.Stream(setup.device)):  # type: ignore[no-untyped-call]
            batches += [_made_up_batch(setup, inputs) for _ in range(math.ceil((AHEAD + 1) / setup.loader_threads))]
    torch.cuda.synchronize(setup.device)
    return batches


def _made_up_batch(setup: TrainingSetup, inputs: int) -> Batch:
    """Noise with every label, turned and scaled."""
    plan = setup.augmentation
    axes = plan.spatial_dimensions
    draw = SampleDraw(angles_rad=(0.1,) * (3 if axes == 3 else 1), scales=(1.1,) * axes, noise_sigma=0.1)
    generator = torch.Generator().manual_seed(0)
    images, labels = [], []
    for _ in range(setup.configuration.batch_size):
        shape, maps = plan.initial_patch_size, 2 if plan.previous_labels else 1
        images.append(torch.randn((inputs - len(plan.previous_labels), *shape), generator=generator).to(setup.device))
        values = torch.randint(len(setup.labels.values), (maps, *shape), generator=generator, dtype=torch.int16)
        labels.append(values.to(setup.device))
    return augment_batch(images, labels, [draw] * len(images), plan)


def _peak_on_gpu(setup: TrainingSetup) -> int | None:
    """What the allocator took from the GPU at most; None where that was not enough."""
    torch.cuda.reset_peak_memory_stats(setup.device)
    before = torch.cuda.memory_reserved(setup.device)
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not setup.deterministic
    fits = True
    try:
        with tempfile.TemporaryDirectory() as folder:
            run_steps(setup, Path(folder))
        torch.cuda.synchronize(setup.device)
    except RuntimeError as error:
        if not _is_of_memory(error):
            raise
        fits = False
    finally:
        torch.backends.cudnn.benchmark = benchmark
    peak = torch.cuda.max_memory_reserved(setup.device) - before
    # Only now does no error hold the tensors of the steps any more.
    gc.collect()
    torch.cuda.empty_cache()
    return peak if fits else None


def _is_of_memory(error: Exception) -> bool:
    """torch's allocators, cuBLAS and oneDNN each say it in their own way."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error).lower() for words in ("alloc", "out of memory", "not enough memory"))


def _peak_in_child(setup: TrainingSetup, most_bytes: int) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_peak_here, setup, most_bytes, torch.get_num_threads()).result()
        except BrokenProcessPool:
            return None


def _peak_here(setup: TrainingSetup, most_bytes: int, threads: int) -> int | None:
    """Growth of this process's memory; it has no more than `most_bytes`, so that nothing else is killed for it."""
    torch.set_num_threads(threads)
    memory = psutil.Process().memory_info()
    resource.setrlimit(resource.RLIMIT_DATA, (memory.data + most_bytes, resource.RLIM_INFINITY))
    try:
        with tempfile.TemporaryDirectory() as folder, freed_memory_kept():
            run_steps(setup, Path(folder))
    except (RuntimeError, MemoryError, OSError) as error:  # OSError: where the folder is tidied up without memory
        if _is_of_memory(error):
            return None
        raise
    return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - memory.rss)
