"""OpenVINO on the CPU: the same ONNX file, compiled for one shape, in the precision that was asked for.

OpenVINO picks its arithmetic itself where the processor has bf16, so it is told, and asked afterwards what it took.
The package reports its own import to a statistics service; here it is imported without the part that does.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends import BackendChoice, Network, Precision
from engine.batching import check_batch, run_in_pieces
from engine.errors import BackendFailed, BundleInvalid, one_line

FloatArray = NDArray[np.float32]

# Model conversion, which nothing here needs, sends "import" to a web service; without it the package works as well and
# is imported in two thirds of the time.
_LEFT_OUT = ("openvino.tools.ovc", "openvino_telemetry")
_NAMES = {"float32": "f32", "bf16": "bf16"}


class OpenVinoBackend:
    """One ONNX file compiled for `batch` windows (channels, *patch_size) and for one, warmed up with zeros.

    `threads` None: one for each core that the runtime sees. Raises BackendFailed where OpenVINO is not installed,
    computes in another precision than asked for, or fails on a batch; BundleInvalid when the file is no network with
    one float32 input of that shape and one output.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        channels: int,
        patch_size: Sequence[int],
        precision: Precision = "float32",
        threads: int | None = None,
        batch: int = 1,
    ) -> None:
        self._runtime = openvino_runtime()
        self._path = model_path
        self._window = (channels, *patch_size)
        self._batch = batch
        self._precision = precision
        self._threads = threads
        self._requests: dict[int, Any] = {}
        self._one_at_a_time = threading.Lock()
        if precision not in _NAMES:
            raise BackendFailed(f"{model_path.name}: OpenVINO does not compute in {precision} on a CPU")
        for size in sorted({batch, 1}):
            self._compile(size)
            self.run(np.zeros((size, *self._window), dtype=np.float32))

    @property
    def name(self) -> str:
        return "openvino"

    @property
    def version(self) -> str:
        """Such as "2026.4.1", without the number of the build."""
        return str(self._runtime.__version__).partition("-")[0]

    @property
    def provider(self) -> str:
        return "cpu"

    @property
    def precision(self) -> str:
        return self._precision

    @property
    def threads(self) -> int:
        """What the runtime says that it uses."""
        return self._used_threads

    @property
    def batch(self) -> int:
        return self._batch

    def run(self, batch: FloatArray) -> FloatArray:
        """See Backend."""
        if not self._requests:
            raise BackendFailed(f"{self._path.name}: the compiled network is closed")
        check_batch(batch, self._window, where=self._path.name)
        try:
            with self._one_at_a_time:
                return run_in_pieces(batch, self._batch, self._run)
        except RuntimeError as error:
            raise BackendFailed(f"{self._path.name}: OpenVINO failed on a batch: {one_line(error)}") from error

    def close(self) -> None:
        self._requests.clear()

    def _run(self, batch: FloatArray) -> FloatArray:
        request = self._requests[len(batch)]
        # Shared with the runtime, not copied; the answer is copied, because the next batch overwrites it.
        request.infer({0: np.ascontiguousarray(batch)}, share_inputs=True)
        logits: FloatArray = np.array(request.get_output_tensor(0).data, dtype=np.float32)
        return logits

    def _compile(self, batch: int) -> None:
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _NAMES[self._precision],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            # Several workers may share the cores, and the kernel knows better than each of them which one is free.
            "ENABLE_CPU_PINNING": False,
        }
        if self._threads:
            options["INFERENCE_NUM_THREADS"] = self._threads
        core = _core()
        try:
            model = core.read_model(str(self._path))
        except RuntimeError as error:
            raise BundleInvalid(f"{self._path.name}: not loadable by OpenVINO: {one_line(error)}") from error
        shape = (batch, *self._window)
        _check_interface(model, shape, self._path.name)
        try:
            model.reshape(list(shape))
            compiled = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise BundleInvalid(
                f"{self._path.name}: OpenVINO cannot compile it for {shape}: {one_line(error)}"
            ) from error
        taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if taken != _NAMES[self._precision]:
            raise BackendFailed(f"{self._path.name}: OpenVINO computes in {taken} here, not in {self._precision}")
        self._used_threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        self._requests[batch] = compiled.create_infer_request()


def open_openvino(network: Network, choice: BackendChoice) -> OpenVinoBackend:
    """See engine.backends.open_backend."""
    if choice.provider != "cpu":
        raise BackendFailed(f"OpenVINO is used on the CPU, not on {choice.provider}")
    return OpenVinoBackend(
        network.file,
        channels=network.channels,
        patch_size=network.patch_size,
        precision=choice.precision,
        threads=choice.threads or None,
        batch=choice.batch,
    )


def openvino_runtime() -> Any:
    """The package openvino, imported without what reports to the outside. Raises BackendFailed where it is missing."""
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    hidden = [name for name in _LEFT_OUT if name not in sys.modules]
    nothing: Any = None  # importing it fails, and openvino foresees that
    sys.modules.update(dict.fromkeys(hidden, nothing))
    try:
        return import_module("openvino")
    except ImportError as error:
        raise BackendFailed(f"OpenVINO cannot be imported: {one_line(error)}") from error
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


@cache
def _core() -> Any:
    """The one core of the process, never freed, with its CPU plugin loaded in a thread that is over.

    The plugin gives the thread that loads it a stack for signals, and unmaps that stack when the last network is freed,
    in whatever thread this happens. The next signal in the first thread would then end the process, without a word:
    Python's handlers run on that stack. Raises BackendFailed where the plugin cannot be loaded.
    """
    runtime = openvino_runtime()
    found: list[Any] = []
    failed: list[RuntimeError] = []

    def load() -> None:
        try:
            core = runtime.Core()
            core.get_property("CPU", "FULL_DEVICE_NAME")
            found.append(core)
        except RuntimeError as error:
            failed.append(error)

    loader = threading.Thread(target=load, name="openvino-core")
    loader.start()
    loader.join()
    if not found:
        raise BackendFailed(f"OpenVINO has no CPU plugin that can be loaded: {one_line(failed[0])}")
    return found[0]


def _check_interface(model: Any, shape: Sequence[int], where: str) -> None:
    if len(model.inputs) != 1 or len(model.outputs) != 1 or model.inputs[0].element_type.get_type_name() != "f32":
        raise BundleInvalid(f"{where}: a network with one float32 input and one output is needed")
    declared = model.inputs[0].partial_shape
    fits = declared.rank.is_static and len(declared) == len(shape)
    if not fits or any(
        size.is_static and size.get_length() != wanted for size, wanted in zip(declared, shape, strict=True)
    ):
        raise BundleInvalid(f"{where}: the network takes {declared}, the plans say {tuple(shape)}")
