"""Which runtimes compute here: each is given a small network and has to return the right numbers.

What a package lists says little: onnxruntime-gpu lists CUDA and TensorRT on machines that have no GPU, and computes on
the CPU instead.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.architecture import Architecture
from engine.backends import BackendChoice, Device, Network, Precision, Provider, Runtime, open_backend
from engine.errors import BackendFailed, BundleInvalid

PROBE_FILE = Path(__file__).with_name("probe.onnx")
"""A U-Net of two stages with every operator of an exported one; tests/unit/test_backend_probe.py writes it."""
PROBE_ARCHITECTURE = Architecture(
    network="plain",
    dimensions=3,
    features_per_stage=(2, 4),
    kernel_sizes=((3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (2, 2, 2)),
    n_conv_per_stage=(1, 1),
    n_conv_per_stage_decoder=(1,),
    conv_bias=True,
    norm_eps=1e-5,
    negative_slope=0.01,
)
PROBE_PATCH = (8, 8, 8)
_HEADS = 2
# What comes of `probe_image` at the voxels [0, 0, 0] and [-1, -1, -1] of both heads, float32.
_EXPECTED = np.array([[1.196912, 1.198707], [-1.182592, -1.183671]])
_CLOSE = {"float32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
# Where a driver shows itself: on Linux, and in a Linux inside Windows. Looked at before torch is imported.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")
_KINDS: tuple[tuple[Runtime, Provider, Precision], ...] = (
    ("onnxruntime", "cpu", "float32"),
    ("openvino", "cpu", "float32"),
    ("openvino", "cpu", "bf16"),
    ("torch", "cpu", "float32"),
    ("onnxruntime", "cuda", "float32"),
    ("onnxruntime", "tensorrt", "float32"),
    ("onnxruntime", "tensorrt", "fp16"),
    ("torch", "cuda", "float32"),
    ("torch", "cuda", "fp16"),
)


@dataclass(frozen=True, kw_only=True)
class BackendStatus:
    """One way to compute. `reason` is None where it computed the right numbers here, else why it is not used; `version`
    is the runtime's, "" where it did not start."""

    runtime: Runtime
    provider: Provider
    precision: Precision
    version: str
    reason: str | None

    @property
    def is_available(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        what = f"{self.runtime} {self.version}".strip()
        return f"{what} on {self.provider}, {self.precision}" + (f": {self.reason}" if self.reason else "")


def available_backends(
    device: Device = "auto", *, runtimes: Collection[Runtime] | None = None
) -> tuple[BackendStatus, ...]:
    """Every way that there is on `device`, tried. `runtimes` None: all, but torch on a processor, where it is never the
    fastest and takes seconds to import."""
    return tuple(
        probe(runtime, provider, precision)
        for runtime, provider, precision in _KINDS
        if (device == "auto" or (provider == "cpu") == (device == "cpu"))
        and (runtime in runtimes if runtimes is not None else (runtime, provider) != ("torch", "cpu"))
    )


@lru_cache(maxsize=len(_KINDS))
def probe(runtime: Runtime, provider: Provider, precision: Precision) -> BackendStatus:
    """Whether it computes here. Asked once in a process: what is installed does not change under it."""
    version, reason = "", _missing(runtime, provider)
    if reason is None:
        try:
            version, reason = _run(BackendChoice(runtime=runtime, provider=provider, precision=precision, threads=1))
        except (BackendFailed, BundleInvalid) as error:
            reason = str(error).removeprefix(f"{PROBE_FILE.name}: ")
    return BackendStatus(runtime=runtime, provider=provider, precision=precision, version=version, reason=reason)


def probe_image() -> NDArray[np.float32]:
    """Waves, (1, 1, *PROBE_PATCH): not the same in any two directions."""
    z, y, x = np.meshgrid(*(np.arange(edge, dtype=np.float64) for edge in PROBE_PATCH), indexing="ij")
    return np.sin(0.9 * z + 0.5 * y - 0.7 * x + 0.1 * y * z)[None, None].astype(np.float32)


def _run(choice: BackendChoice) -> tuple[str, str | None]:
    """The runtime's version, and what is wrong with its answer."""
    network = Network(
        file=PROBE_FILE, channels=1, heads=_HEADS, patch_size=PROBE_PATCH, architecture=PROBE_ARCHITECTURE
    )
    backend = open_backend(network, choice)
    try:
        answer = backend.run(probe_image())[0]
        found = np.stack([answer[:, 0, 0, 0], answer[:, -1, -1, -1]], axis=1)
        error = float(np.abs(found - _EXPECTED).max())
        if not math.isfinite(error) or error > _CLOSE[choice.precision] * float(np.abs(_EXPECTED).max()):
            return backend.version, f"computes something else than it should (off by {error:.2g})"
        return backend.version, None
    finally:
        backend.close()


def _missing(runtime: Runtime, provider: Provider) -> str | None:
    """Why there is no need to try, where that is known without importing anything large."""
    if runtime == "torch" and (find_spec("torch") is None or find_spec("onnx") is None):
        return "torch or onnx is not installed (the extra `train` has both)"
    if find_spec(runtime) is None:
        return "is not installed"
    if runtime == "torch" and provider == "cuda" and not any(Path(device).exists() for device in _DRIVERS):
        return "no NVIDIA driver is loaded"
    return None
