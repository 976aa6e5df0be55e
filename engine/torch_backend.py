"""An exported network in torch, for workers with a GPU: compiled, channels last, in half precision where asked (torch).

The weights come out of the ONNX file by the names that torch gives them, so that nothing is unpickled and the digest
that covers the file covers them. Half precision is torch's autocast, as in nnU-Net's own prediction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from engine.backends import BackendChoice, Network
from engine.batching import check_batch, run_in_pieces
from engine.errors import BackendFailed, BundleInvalid, one_line
from engine.network import build_network

FloatArray = NDArray[np.float32]

# Heads of deep supervision other than the full resolution's are not exported.
_NOT_EXPORTED = "decoder.seg_layers."
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class TorchOnnxBackend:
    """The network of an ONNX file in torch, warmed up with `choice.batch` windows of zeros.

    On a GPU it is compiled for that shape and laid out channels last; on a processor neither gains anything in float32.
    `choice.threads` are the process's threads in torch, since torch has no others. Raises BackendFailed where torch has
    no such device or fails on a batch, BundleInvalid for a file that does not hold the weights of the architecture.
    """

    def __init__(self, network: Network, choice: BackendChoice) -> None:
        self._where = network.file.name
        if choice.provider == "tensorrt":
            raise BackendFailed(f"{self._where}: torch computes on cpu or cuda, not on TensorRT")
        if choice.provider == "cuda" and not torch.cuda.is_available():
            raise BackendFailed(f"{self._where}: torch {torch.__version__} finds no GPU")
        self._choice = choice
        self._device = torch.device(choice.provider)
        self._window = (network.channels, *network.patch_size)
        if choice.threads:
            torch.set_num_threads(choice.threads)
        self._network: Any = None
        loaded: Any = load_exported(network).to(self._device)
        if self._device.type == "cuda":
            layout = torch.channels_last_3d if len(network.patch_size) == 3 else torch.channels_last
            loaded = loaded.to(memory_format=layout)
            self._network = torch.compile(loaded)
        else:
            self._network = loaded
        self.run(np.zeros((choice.batch, *self._window), dtype=np.float32))

    @property
    def name(self) -> str:
        return "torch"

    @property
    def version(self) -> str:
        return str(torch.__version__)

    @property
    def provider(self) -> str:
        return self._device.type

    @property
    def precision(self) -> str:
        return self._choice.precision

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    @property
    def batch(self) -> int:
        return self._choice.batch

    def run(self, batch: FloatArray) -> FloatArray:
        """See Backend."""
        if self._network is None:
            raise BackendFailed(f"{self._where}: the network is closed")
        check_batch(batch, self._window, where=self._where)
        try:
            return run_in_pieces(batch, self._choice.batch, self._run)
        except RuntimeError as error:  # also what a compiler or a lost device raises
            raise BackendFailed(f"{self._where}: torch failed on a batch: {one_line(error)}") from error

    def close(self) -> None:
        self._network = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, batch: FloatArray) -> FloatArray:
        image = torch.from_numpy(np.ascontiguousarray(batch)).to(self._device)
        with torch.inference_mode(), _arithmetic(self._device.type, self._choice.precision):
            answer: Tensor = self._network(image)
        logits: FloatArray = answer.float().cpu().numpy()
        return logits


def open_torch(network: Network, choice: BackendChoice) -> TorchOnnxBackend:
    """See engine.backends.open_backend."""
    return TorchOnnxBackend(network, choice)


def load_exported(network: Network) -> nn.Module:
    """The network in evaluation mode, float32, on the CPU, with the weights of its ONNX file.

    Names and shapes are checked before anything of the size that the plans ask for is allocated. Raises BundleInvalid.
    """
    where = network.file.name
    try:
        graph = onnx.load(str(network.file)).graph
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise BundleInvalid(f"{where}: cannot be read as ONNX: {one_line(error)}") from error
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    with torch.device("meta"):
        built = build_network(network.architecture, channels=network.channels, heads=network.heads)
    expected = built.state_dict()
    last = len(network.architecture.n_conv_per_stage_decoder) - 1
    weights: dict[str, Tensor] = {}
    for name, parameter in expected.items():
        if name in stored:
            if stored[name].shape != tuple(parameter.shape):
                raise BundleInvalid(
                    f"{where}: {name} has shape {stored[name].shape}, the plans need {tuple(parameter.shape)}"
                )
            weights[name] = torch.from_numpy(stored[name].astype(np.float32))
        elif name.startswith(_NOT_EXPORTED) and not name.startswith(f"{_NOT_EXPORTED}{last}."):
            weights[name] = torch.zeros(parameter.shape)
        else:
            raise BundleInvalid(f"{where}: has no {name}; it is not the network of the plans")
    built.load_state_dict(weights, strict=True, assign=True)
    built.requires_grad_(False)
    built.eval()
    return built


@contextlib.contextmanager
def _arithmetic(device: str, precision: str) -> Iterator[None]:
    """Within the block convolutions compute in that precision; float32 is float32, without TF32 on a GPU."""
    with contextlib.ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(
                torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False)
            )
        if precision != "float32":
            stack.enter_context(torch.autocast(device, dtype=_HALF[precision]))
        yield
