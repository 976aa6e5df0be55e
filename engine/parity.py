"""Whether an exported network computes what the original computes, and how fast each backend does it here (torch)."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.backend_figures import BackendFigure, running_backends
from engine.backends import Backend
from engine.errors import BackendFailed, ParityFailed
from engine.labels import LabelManager
from engine.manifest import Parity, Weights
from engine.network import UNet
from engine.onnx_graph import is_kernel, to_float16
from engine.plans import Configuration

# Two float32 implementations add in different orders; the error grows with the size of the logits (measured about
# 1e-5 of the largest on trained networks).
MAX_ABS_DIFFERENCE = 1e-3
MAX_RELATIVE_DIFFERENCE = 1e-4
MIN_ARGMAX_AGREEMENT = 0.9999
_SEED = 20_230_817
# A network of milliseconds is run a few times more, since the fastest run says most.
_TIMED_S, _TIMED_RUNS = 0.5, 6

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class MeasuredNetwork:
    """The reference backend's parity, each backend's figures, and what a person should know of the other backends."""

    parity: Parity
    figures: tuple[BackendFigure, ...]
    notes: tuple[str, ...]


def check_parity(
    network: UNet,
    onnx_file: Path,
    configuration: Configuration,
    *,
    channels: int,
    label_manager: LabelManager,
    fold: str,
    weights: Weights = "float32",
) -> MeasuredNetwork:
    """Compare torch with every backend that runs here, on seeded noise and on a smooth structured image of the patch's
    size.

    Raises ParityFailed when the reference backend's largest difference exceeds both limits of this module, or fewer
    than MIN_ARGMAX_AGREEMENT of the voxels get the same label; another backend's is only noted. With `weights` "fp16"
    these limits are for torch with the kernels rounded alike, which proves the graph; what is recorded is the
    difference to the network as it was trained, and the sanity cases decide whether it is small enough.
    """
    where = f"{configuration.name} fold {fold}"
    images = parity_images(channels, configuration.patch_size)
    trained = [_by_torch(network, image, where) for image in images]
    stored = trained
    if weights == "fp16":
        rounded = with_rounded_kernels(network)
        stored = [_by_torch(rounded, image, where) for image in images]
    found: list[BackendFigure] = []
    notes: list[str] = []
    for backend in running_backends(onnx_file, channels=channels, patch_size=configuration.patch_size):
        try:
            answers, seconds = _run(backend, images)
            fault = _Difference.between(answers, stored, label_manager, where).fault()
            difference = _Difference.between(answers, trained, label_manager, where)
            name = f"{backend.name} on {backend.provider}"
            if fault and not found:
                raise ParityFailed(f"{where}: {name} {fault}")
            if fault:
                notes.append(f"{where}: {name} {fault}; it runs where `seggate models tune` finds the labels the same")
            found.append(
                BackendFigure(
                    configuration=configuration.name,
                    fold=fold,
                    backend=backend.name,
                    version=backend.version,
                    provider=backend.provider,
                    precision=backend.precision,
                    threads=backend.threads,
                    max_abs_difference=difference.largest,
                    argmax_agreement=difference.agreement,
                    seconds_per_window=float(f"{seconds:.3g}"),
                )
            )
        except BackendFailed as error:
            if not found:
                raise
            notes.append(f"{where}: {error}")
        finally:
            backend.close()
    return MeasuredNetwork(
        parity=Parity(
            configuration=configuration.name,
            fold=fold,
            max_abs_difference=found[0].max_abs_difference,
            argmax_agreement=found[0].argmax_agreement,
        ),
        figures=tuple(found),
        notes=tuple(notes),
    )


def with_rounded_kernels(network: UNet) -> UNet:
    """A copy whose kernels have the values that float16 can hold. Raises ParityFailed where one cannot."""
    rounded = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            values = parameter.numpy()
            if is_kernel(name, values):
                parameter.copy_(torch.from_numpy(to_float16(name, values).astype(np.float32)))
    return rounded


def parity_images(channels: int, patch_size: tuple[int, ...]) -> list[FloatArray]:
    """Noise, and smooth waves with one bright box: both have about the mean 0 and deviation 1 of normalised images."""
    random = np.random.default_rng(_SEED)
    noise = random.standard_normal((channels, *patch_size), dtype=np.float32)
    grids = np.meshgrid(*(np.linspace(0.0, 1.0, edge) for edge in patch_size), indexing="ij")
    structured = np.zeros((channels, *patch_size), dtype=np.float32)
    for channel in range(channels):
        for grid in grids:
            structured[channel] += np.sin(2 * np.pi * (random.uniform(0.5, 3.0) * grid + random.uniform()))
    structured[:, *(slice(edge // 3, 2 * edge // 3 + 1) for edge in patch_size)] += 2.0
    return [noise, structured]


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """Between logits: the largest difference, the largest logit, the share of voxels with one label."""

    largest: float
    magnitude: float
    agreement: float

    @classmethod
    def between(
        cls, found: list[FloatArray], expected: list[FloatArray], labels: LabelManager, where: str
    ) -> _Difference:
        equal, voxels = 0, 0
        for own, theirs in zip(found, expected, strict=True):
            if own.shape != theirs.shape or not np.isfinite(own).all():
                raise ParityFailed(f"{where}: the exported network gives another shape or values that are not finite")
            same = labels.logits_to_labels(own) == labels.logits_to_labels(theirs)
            equal, voxels = equal + int(same.sum()), voxels + same.size
        return cls(
            largest=max(float(np.abs(own - theirs).max()) for own, theirs in zip(found, expected, strict=True)),
            magnitude=max(float(np.abs(theirs).max()) for theirs in expected),
            agreement=equal / voxels,
        )

    def fault(self) -> str | None:
        limit = max(MAX_ABS_DIFFERENCE, MAX_RELATIVE_DIFFERENCE * self.magnitude)
        if self.largest <= limit and self.agreement >= MIN_ARGMAX_AGREEMENT:
            return None
        return (
            f"differs from torch by {self.largest:.2e} (limit {limit:.2e}); {self.agreement:.6f} of the voxels get the "
            f"same label (limit {MIN_ARGMAX_AGREEMENT})"
        )


def _by_torch(network: UNet, image_CZYX: FloatArray, where: str) -> FloatArray:
    with torch.inference_mode():
        logits: FloatArray = network(torch.from_numpy(image_CZYX[None])).numpy()[0]
    if not np.isfinite(logits).all():
        raise ParityFailed(f"{where}: the network gives values that are not finite")
    return logits


def _run(backend: Backend, images: list[FloatArray]) -> tuple[list[FloatArray], float]:
    """Logits of each image, and the seconds of the fastest run; backends come warmed up."""
    answers: list[FloatArray] = []
    seconds: list[float] = []
    while len(answers) < len(images) or (sum(seconds) < _TIMED_S and len(seconds) < _TIMED_RUNS):
        batch = images[len(seconds) % len(images)][None]
        start = time.perf_counter()
        answers.append(backend.run(batch)[0])
        seconds.append(time.perf_counter() - start)
    return answers[: len(images)], min(seconds)
