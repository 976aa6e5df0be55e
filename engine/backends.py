"""What runs a network: a session of ONNX Runtime on CUDA or on the CPU.

A provider counts as present only after it has run a batch: ONNX Runtime lists CUDA wherever its package was built
with it, and silently computes on the CPU where the driver is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import BackendFailed, BundleInvalid

FloatArray = NDArray[np.float32]
Device = Literal["auto", "cpu", "cuda"]

_NO_PROVIDER = "this onnxruntime package has no CUDA provider (the extra `gpu` has)"
_log = logging.getLogger(__name__)


class Backend(Protocol):
    """Runs one network on batches of one fixed shape.

    `name` and `version` are those of the runtime, `provider` what computes ("cpu", "cuda"), `precision` the arithmetic
    of the convolutions ("float32").
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
        """float32 (N, C, [Z,] Y, X) → logits float32 (N, K, [Z,] Y, X). Raises BackendFailed."""
        ...

    def close(self) -> None:
        """Frees the device; `run` must not be called afterwards."""
        ...


class OnnxBackend:
    """One ONNX file in ONNX Runtime, warmed up with a batch of zeros of shape (1, channels, *patch_size).

    `device`: "cpu"; "cuda" (BackendFailed where it does not run a batch); "auto" (CUDA where it runs a batch, else the
    CPU, with a warning where CUDA is offered and fails). `threads`: intra-operator threads, None leaves the choice to
    the runtime.
    Raises BundleInvalid when the file is no network with one input and one output of the expected number of axes.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        channels: int,
        patch_size: Sequence[int],
        device: Device = "auto",
        threads: int | None = None,
    ) -> None:
        import onnxruntime  # here, so that the module can be imported where no runtime is installed

        self._runtime: Any = onnxruntime
        self._path = model_path
        self._shape = (1, channels, *patch_size)
        self._threads = threads or 0
        self._session: Any = None
        self._provider: str
        if device == "cpu":
            self._open_cpu()
            return
        offered = "CUDAExecutionProvider" in self._runtime.get_available_providers()
        reason = self._open_cuda() if offered else _NO_PROVIDER
        if reason is None:
            return
        if device == "cuda":
            raise BackendFailed(f"{model_path.name}: CUDA was asked for and cannot be used: {reason}")
        # A package without CUDA is what was installed; one with CUDA that does not work is news.
        _log.log(logging.WARNING if offered else logging.DEBUG, "CUDA is not used for %s: %s", model_path.name, reason)
        self._open_cpu()

    @property
    def name(self) -> str:
        return "onnxruntime"

    @property
    def version(self) -> str:
        return str(self._runtime.__version__)

    @property
    def provider(self) -> str:
        return self._provider

    @property
    def precision(self) -> str:
        return "float32"

    @property
    def batch(self) -> int:
        return 1

    @property
    def threads(self) -> int:
        """Intra-operator threads asked for; 0 = the runtime's own choice (one per physical core)."""
        return self._threads

    def run(self, batch: FloatArray) -> FloatArray:
        """See Backend. The shape is fixed: the runtime's memory grows with every new shape and does not shrink."""
        if self._session is None:
            raise BackendFailed(f"{self._path.name}: the session is closed")
        if batch.shape != self._shape or batch.dtype != np.float32:
            raise BackendFailed(
                f"{self._path.name}: takes float32 {self._shape}, was given {batch.dtype} {batch.shape}"
            )
        try:
            (logits,) = self._session.run(None, {self._input: batch})
        except _failures(self._runtime) as error:
            raise BackendFailed(f"{self._path.name}: {self._provider} failed on a batch: {_one_line(error)}") from error
        result: FloatArray = logits.astype(np.float32, copy=False)
        return result

    def close(self) -> None:
        self._session = None

    def _open_cpu(self) -> None:
        self._open(["CPUExecutionProvider"], "cpu")
        self.run(np.zeros(self._shape, dtype=np.float32))

    def _open_cuda(self) -> str | None:
        """None when CUDA has run a batch, else the reason why it is not used (the session is closed again)."""
        # TF32 would round the inputs of convolutions to 10 bits of mantissa.
        options = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        try:
            self._open([("CUDAExecutionProvider", options), "CPUExecutionProvider"], "cuda")
            if "CUDAExecutionProvider" not in self._session.get_providers():
                self.close()
                return "the provider is listed but did not start (driver or libraries are missing)"
            self.run(np.zeros(self._shape, dtype=np.float32))
        except (BackendFailed, BundleInvalid) as error:
            self.close()
            return str(error)
        return None

    def _open(self, providers: list[Any], provider: str) -> None:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Threads may spin while a batch runs, but must sleep between batches: other processes want the cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        try:
            session = self._runtime.InferenceSession(str(self._path), options, providers=providers)
        except _failures(self._runtime) as error:
            raise BundleInvalid(f"{self._path.name}: not loadable by onnxruntime: {_one_line(error)}") from error
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type != "tensor(float)":
            raise BundleInvalid(f"{self._path.name}: a network with one float32 input and one output is needed")
        declared = inputs[0].shape
        if len(declared) != len(self._shape) or any(
            isinstance(size, int) and size != wanted for size, wanted in zip(declared, self._shape, strict=True)
        ):
            raise BundleInvalid(f"{self._path.name}: the network takes {declared}, the plans say {self._shape}")
        self._input = inputs[0].name
        self._session, self._provider = session, provider


def _failures(runtime: Any) -> tuple[type[Exception], ...]:
    """What the runtime raises: classes of its binding that have Exception as their only ancestor in common."""
    binding = vars(runtime.capi.onnxruntime_pybind11_state).values()
    own = [item for item in binding if isinstance(item, type) and issubclass(item, Exception)]
    return (*own, RuntimeError)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
