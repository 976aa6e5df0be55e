"""What runs a network: one small protocol, the runtimes that keep it, and how one of them is chosen and opened.

The runtimes themselves are in engine/onnx_backend.py, engine/openvino_backend.py and engine/torch_backend.py. Each is
imported when it is opened and not before: a process pays only for the one that it uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from engine.architecture import Architecture

FloatArray = NDArray[np.float32]
Device = Literal["auto", "cpu", "cuda"]
Runtime = Literal["onnxruntime", "openvino", "torch"]
Provider = Literal["cpu", "cuda", "tensorrt"]
Precision = Literal["float32", "bf16", "fp16"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
PROVIDERS: tuple[Provider, ...] = get_args(Provider)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


class Backend(Protocol):
    """Runs one network on batches of windows of one fixed shape.

    `name` and `version` are those of the runtime, `provider` what computes ("cpu", "cuda", "tensorrt"), `precision` the
    arithmetic of the convolutions ("float32", "bf16", "fp16"), `threads` how many it may use (0: its own choice).
    `batch` is how many windows at a time it was made for.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def provider(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def batch(self) -> int: ...

    def run(self, batch: FloatArray) -> FloatArray:
        """float32 (N, C, [Z,] Y, X), any N → logits float32 (N, K, [Z,] Y, X). May be called by several
        threads, one of which runs at a time where the runtime cannot do more. Raises BackendFailed."""
        ...

    def close(self) -> None:
        """Frees the device; `run` must not be called afterwards."""
        ...


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """A runtime, where it computes and in which arithmetic. `threads` 0 leaves their number to the runtime; `batch` is
    how many windows it gets at a time."""

    runtime: Runtime
    provider: Provider
    precision: Precision
    threads: int = 0
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.runtime} on {self.provider}, {self.precision}"


@dataclass(frozen=True, kw_only=True)
class Network:
    """One exported network: its ONNX `file`, what it takes and gives, and what it is built like (for torch, which does
    not read ONNX files)."""

    file: Path
    channels: int
    heads: int
    patch_size: tuple[int, ...]
    architecture: Architecture


def open_backend(network: Network, choice: BackendChoice) -> Backend:
    """The network, loaded and warmed up as it was chosen.

    Raises BackendFailed where the runtime is not installed, does not compute here as asked, or fails on a batch;
    BundleInvalid for a file that is no such network.
    """
    match choice.runtime:
        case "onnxruntime":
            from engine.onnx_backend import open_onnx

            return open_onnx(network, choice)
        case "openvino":
            from engine.openvino_backend import open_openvino

            return open_openvino(network, choice)
        case "torch":
            from engine.torch_backend import open_torch

            return open_torch(network, choice)


def open_default(network: Network, *, device: Device, threads: int | None) -> Backend:
    """The network in ONNX Runtime, float32: what runs where nothing was measured."""
    from engine.onnx_backend import OnnxBackend

    return OnnxBackend(
        network.file, channels=network.channels, patch_size=network.patch_size, device=device, threads=threads
    )
