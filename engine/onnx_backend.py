"""ONNX Runtime: on the CPU, on CUDA with its buffers kept on the device, and TensorRT.

A provider counts as present only after it has run a batch: ONNX Runtime lists CUDA wherever its package was built
with it, and silently computes on the CPU where the driver is missing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.backends import BackendChoice, Device, Network, Precision, Provider
from engine.batching import check_batch, run_in_pieces
from engine.errors import BackendFailed, BundleInvalid, one_line

FloatArray = NDArray[np.float32]

_NO_PROVIDER = "this onnxruntime package has no {} provider (the extra `gpu` has)"
_EXECUTION_PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_log = logging.getLogger(__name__)


class OnnxBackend:
    """One ONNX file in ONNX Runtime, warmed up with `batch` windows of zeros (channels, *patch_size).

    `device`: "cpu"; "cuda" or "tensorrt" (BackendFailed where it does not run a batch); "auto" (CUDA where it runs a
    batch, else the CPU, with a warning where CUDA is offered and fails). `precision` "fp16" is TensorRT's alone.
    `threads`: intra-operator threads, None leaves the choice to the runtime.
    Raises BundleInvalid when the file is no network with one input and one output of the expected number of axes.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        channels: int,
        patch_size: Sequence[int],
        device: Device | Literal["tensorrt"] = "auto",
        precision: Precision = "float32",
        threads: int | None = None,
        batch: int = 1,
    ) -> None:
        self._runtime = onnx_runtime()
        self._path = model_path
        self._window = (channels, *patch_size)
        self._batch = batch
        self._threads = threads or 0
        self._precision = precision
        self._session: Any = None
        self._bound: dict[int, _BoundBuffers] = {}
        self._provider: Provider = "cpu"
        if precision == "bf16" or (precision == "fp16" and device != "tensorrt"):
            raise BackendFailed(f"{model_path.name}: ONNX Runtime does not compute in {precision} on {device}")
        if device == "cpu":
            self._open_cpu()
            return
        provider: Provider = "tensorrt" if device == "tensorrt" else "cuda"
        offered = _EXECUTION_PROVIDERS[provider] in self._runtime.get_available_providers()
        reason = self._open_gpu(provider) if offered else _NO_PROVIDER.format(provider.upper())
        if reason is None:
            return
        if device != "auto":
            raise BackendFailed(f"{model_path.name}: {provider.upper()} was asked for and cannot be used: {reason}")
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
        return self._precision

    @property
    def threads(self) -> int:
        """Intra-operator threads asked for; 0 = the runtime's own choice (one per physical core)."""
        return self._threads

    @property
    def batch(self) -> int:
        return self._batch

    def run(self, batch: FloatArray) -> FloatArray:
        """See Backend."""
        if self._session is None:
            raise BackendFailed(f"{self._path.name}: the session is closed")
        check_batch(batch, self._window, where=self._path.name)
        try:
            return run_in_pieces(batch, self._batch, self._run)
        except _failures(self._runtime) as error:
            raise BackendFailed(f"{self._path.name}: {self._provider} failed on a batch: {one_line(error)}") from error

    def close(self) -> None:
        self._bound.clear()
        self._session = None

    def _run(self, batch: FloatArray) -> FloatArray:
        if self._provider == "cpu":
            (logits,) = self._session.run(None, {self._input: batch})
            result: FloatArray = logits.astype(np.float32, copy=False)
            return result
        bound = self._bound.get(len(batch))
        if bound is None:
            bound = self._bound[len(batch)] = _BoundBuffers(
                self._runtime, self._session, batch.shape, heads=self._heads(batch), device="cuda"
            )
        return bound.run(batch)

    def _heads(self, batch: FloatArray) -> int:
        """K of the output; a graph that does not say so is asked once, unbound."""
        declared = self._session.get_outputs()[0].shape[1]
        return declared if isinstance(declared, int) else int(self._session.run(None, {self._input: batch})[0].shape[1])

    def _open_cpu(self) -> None:
        self._open(["CPUExecutionProvider"], "cpu")
        self.run(self._zeros())

    def _open_gpu(self, provider: Provider) -> str | None:
        """None when the provider has run a batch, else the reason why it is not used (the session is closed again)."""
        # TF32 would round the inputs of convolutions to 10 bits of mantissa.
        cuda = ("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"})
        tensorrt = ("TensorrtExecutionProvider", {"trt_fp16_enable": str(int(self._precision == "fp16"))})
        wanted = [tensorrt, cuda] if provider == "tensorrt" else [cuda]
        try:
            self._open([*wanted, "CPUExecutionProvider"], provider)
            if _EXECUTION_PROVIDERS[provider] not in self._session.get_providers():
                self.close()
                return "the provider is listed but did not start (driver or libraries are missing)"
            self.run(self._zeros())
        except (BackendFailed, BundleInvalid) as error:
            self.close()
            return str(error)
        return None

    def _zeros(self) -> FloatArray:
        return np.zeros((self._batch, *self._window), dtype=np.float32)

    def _open(self, providers: list[Any], provider: Provider) -> None:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Threads may spin while a batch runs, but must sleep between batches: other processes want the cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        try:
            session = self._runtime.InferenceSession(str(self._path), options, providers=providers)
        except _failures(self._runtime) as error:
            raise BundleInvalid(f"{self._path.name}: not loadable by onnxruntime: {one_line(error)}") from error
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type != "tensor(float)":
            raise BundleInvalid(f"{self._path.name}: a network with one float32 input and one output is needed")
        declared, shape = inputs[0].shape, (self._batch, *self._window)
        if len(declared) != len(shape) or any(
            isinstance(size, int) and size != wanted for size, wanted in zip(declared, shape, strict=True)
        ):
            raise BundleInvalid(f"{self._path.name}: the network takes {declared}, the plans say {shape}")
        self._input = inputs[0].name
        self._session, self._provider = session, provider


class _BoundBuffers:
    """Input and output of one shape, kept on `device`: a batch is copied in, its logits out, nothing else moves."""

    def __init__(self, runtime: Any, session: Any, shape: Sequence[int], *, heads: int, device: str) -> None:
        self._session = session
        self._one_at_a_time = threading.Lock()
        self._input = runtime.OrtValue.ortvalue_from_shape_and_type(list(shape), np.float32, device, 0)
        self._output = runtime.OrtValue.ortvalue_from_shape_and_type(
            [shape[0], heads, *shape[2:]], np.float32, device, 0
        )
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(session.get_inputs()[0].name, self._input)
        self._binding.bind_ortvalue_output(session.get_outputs()[0].name, self._output)

    def run(self, batch: FloatArray) -> FloatArray:
        with self._one_at_a_time:
            self._input.update_inplace(np.ascontiguousarray(batch))
            self._session.run_with_iobinding(self._binding)
            # A copy of its own: on the CPU the value is a view of the buffer, which the next batch overwrites.
            logits: FloatArray = np.array(self._output.numpy())
        return logits


def open_onnx(network: Network, choice: BackendChoice) -> OnnxBackend:
    """See engine.backends.open_backend."""
    return OnnxBackend(
        network.file,
        channels=network.channels,
        patch_size=network.patch_size,
        device=choice.provider,
        precision=choice.precision,
        threads=choice.threads or None,
        batch=choice.batch,
    )


def onnx_runtime() -> Any:
    """The package onnxruntime; raises BackendFailed, with what to install, where it is missing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendFailed("ONNX Runtime is not installed: make install (extra `cpu` or `gpu`)") from error
    return onnxruntime


def _failures(runtime: Any) -> tuple[type[Exception], ...]:
    """What the runtime raises: classes of its binding that have Exception as their only ancestor in common."""
    binding = vars(runtime.capi.onnxruntime_pybind11_state).values()
    own = [item for item in binding if isinstance(item, type) and issubclass(item, Exception)]
    return (*own, RuntimeError)
