"""Writes one of nnU-Net's U-Nets as an ONNX graph, straight from the architecture and the weights.

Same input gives the same bytes on every machine and with every release of torch: no tracing, no paths, no time. Few
operators are used: Conv, ConvTranspose, InstanceNormalization, LeakyRelu, Concat, for residual encoders AveragePool,
and arithmetic. Where kernels are stored as float16, Cast makes them float32 again, so that all arithmetic stays
float32. Heads of deep supervision other than the full resolution's are left out. Whether the graph computes what the
original network does is checked by engine/parity.py for every file.

Of large feature maps instance normalization is written out, with means that are taken axis by axis. The operator adds
the million voxels of a large patch up one after the other, in float32, in ONNX Runtime and in OpenVINO: through the 22
normalizations of nnU-Net's default network logits were off by 5e-4 and 1.5e-3 of the largest (torch: 2e-6), and one
voxel in 730 had another label (docs/performance.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engine.architecture import Architecture
from engine.errors import ParityFailed

OPSET = 17
LARGE_VOXELS = 1 << 17
"""Of one channel of a feature map: from here on its mean is taken axis by axis."""
IR_VERSION = 8  # the oldest that goes with opset 17
INPUT = "image"
OUTPUT = "logits"
# A protobuf message ends at 2 GiB; above this the weights go into a file of their own beside the graph.
EXTERNAL_DATA_BYTES = 1_900_000_000


def write_onnx(
    path: Path,
    architecture: Architecture,
    weights: Mapping[str, NDArray[np.float32]],
    *,
    channels: int,
    heads: int,
    patch_size: Sequence[int],
    half: bool = False,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
) -> list[Path]:
    """Write `path` (and `path` + ".data" when the weights exceed `external_data_bytes`); returns what was written.

    `half`: the kernels of convolutions are stored as float16. Raises ParityFailed for one that float16 cannot hold.

    Input `image` float32 (batch, channels, *patch_size), output `logits` float32 (batch, heads, *patch_size); only
    the batch is free. `weights` by the names of engine/network.py, complete.
    """
    graph = _Graph(architecture, weights, voxels=math.prod(patch_size), half=half)
    features, skips = INPUT, []
    if architecture.network == "residual":
        features = graph.conv_norm("encoder.stem.convs.0", features, stride=graph.one)
    for stage, (count, stride) in enumerate(zip(architecture.n_conv_per_stage, architecture.strides, strict=True)):
        place = f"encoder.stages.{stage}"
        for index in range(count):
            step = stride if index == 0 else graph.one
            if architecture.network == "plain":
                features = graph.conv_norm(f"{place}.0.convs.{index}", features, stride=step)
            else:
                features = graph.residual_block(f"{place}.blocks.{index}", features, stride=step)
        skips.append(features)
    for level, count in enumerate(architecture.n_conv_per_stage_decoder):
        up = graph.transposed(f"decoder.transpconvs.{level}", features, architecture.strides[-1 - level])
        features = graph.node("Concat", [up, skips[-2 - level]], axis=1)
        for index in range(count):
            features = graph.conv_norm(f"decoder.stages.{level}.convs.{index}", features, stride=graph.one)
    last = len(architecture.n_conv_per_stage_decoder) - 1
    graph.conv(f"decoder.seg_layers.{last}", features, stride=graph.one, output=OUTPUT)

    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "UNet",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", channels, *patch_size])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", heads, *patch_size])],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="seggate",
    )
    size = sum(array.nbytes for array in graph.used.values())
    if size <= external_data_bytes:
        path.write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(path))
        return [path]
    data = path.with_name(path.name + ".data")
    onnx.save_model(
        model,
        str(path),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=data.name,
        size_threshold=1024,
    )
    onnx.checker.check_model(str(path))
    return [path, data]


def is_kernel(name: str, array: NDArray[Any]) -> bool:
    """Whether a parameter is the kernel of a convolution: the only ones that are ever stored as float16."""
    return name.endswith(".weight") and array.ndim > 1


def to_float16(name: str, array: NDArray[np.float32]) -> NDArray[np.float16]:
    """Rounded to float16. Raises ParityFailed where the largest value is beyond it."""
    largest = float(np.abs(array).max(initial=0.0))
    if largest > float(np.finfo(np.float16).max):
        raise ParityFailed(f"parameter {name}: {largest:.3g} is beyond float16; store the weights as float32")
    return array.astype(np.float16)


class _Graph:
    """Nodes and initialisers in the order of computation; every value is named by the node that makes it."""

    def __init__(
        self, architecture: Architecture, weights: Mapping[str, NDArray[np.float32]], *, voxels: int, half: bool
    ) -> None:
        self.architecture = architecture
        self.voxels = voxels  # of one channel of what was made last
        self.half = half
        self.weights = weights
        self.one = (1,) * architecture.dimensions
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.used: dict[str, NDArray[Any]] = {}

    def node(self, operator: str, inputs: list[str], *, output: str | None = None, **attributes: Any) -> str:
        output = output or f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"node_{len(self.nodes)}", **attributes))
        return output

    def parameters(self, name: str) -> list[str]:
        """Weight and, if there is one, bias, as initialisers; a kernel that is stored as float16, as the value that it
        is cast to."""
        names = [f"{name}.weight"] + ([f"{name}.bias"] if f"{name}.bias" in self.weights else [])
        values = []
        for key in names:
            array: NDArray[Any] = np.ascontiguousarray(self.weights[key], dtype=np.float32)
            is_half = self.half and is_kernel(key, array)
            if is_half:
                array = to_float16(key, array)
            self.used[key] = array
            self.initializers.append(numpy_helper.from_array(array, key))
            values.append(self.node("Cast", [key], output=f"{key}.float32", to=TensorProto.FLOAT) if is_half else key)
        return values

    def conv(self, name: str, features: str, *, stride: Sequence[int], output: str | None = None) -> str:
        kernel = self.weights[f"{name}.weight"].shape[2:]
        padding = [(edge - 1) // 2 for edge in kernel]
        return self.node(
            "Conv",
            [features, *self.parameters(name)],
            output=output,
            kernel_shape=list(kernel),
            strides=list(stride),
            pads=padding * 2,
        )

    def transposed(self, name: str, features: str, stride: Sequence[int]) -> str:
        self.voxels *= math.prod(stride)
        return self.node(
            "ConvTranspose", [features, *self.parameters(name)], kernel_shape=list(stride), strides=list(stride)
        )

    def norm(self, name: str, features: str) -> str:
        """(x - mean) / sqrt(variance + epsilon) * weight + bias, per sample and channel."""
        if self.voxels < LARGE_VOXELS:
            return self.node(
                "InstanceNormalization", [features, *self.parameters(name)], epsilon=self.architecture.norm_eps
            )
        weight, bias = (self._by_channel(value) for value in self.parameters(name))
        epsilon = self._constant("norm_eps", np.float32(self.architecture.norm_eps))
        centred = self.node("Sub", [features, self._mean(features)])
        variance = self._mean(self.node("Mul", [centred, centred]))
        deviation = self.node("Sqrt", [self.node("Add", [variance, epsilon])])
        scaled = self.node("Mul", [centred, self.node("Div", [weight, deviation])])
        return self.node("Add", [scaled, bias])

    def _mean(self, features: str) -> str:
        """Over all axes of space, the last first. Of reductions that follow one another OpenVINO makes a single one,
        which would add up all voxels again; a product with a power of two, which is exact, keeps them apart."""
        dimensions = self.architecture.dimensions
        half, two = self._constant("half", np.float32(0.5)), self._constant("two", np.float32(2))
        for axis in reversed(range(2, 2 + dimensions)):
            features = self.node("ReduceMean", [features], axes=[axis], keepdims=1)
            if axis > 2:
                features = self.node("Mul", [features, half])
        for _ in range(dimensions - 1):
            features = self.node("Mul", [features, two])
        return features

    def _by_channel(self, value: str) -> str:
        """(C) → (1, C, 1, 1, 1)"""
        shape = [1, -1, *self.one]
        return self.node("Reshape", [value, self._constant("by_channel", np.array(shape, dtype=np.int64))])

    def _constant(self, name: str, value: Any) -> str:
        if name not in self.used:
            self.used[name] = np.asarray(value)
            self.initializers.append(numpy_helper.from_array(self.used[name], name))
        return name

    def activation(self, features: str) -> str:
        return self.node("LeakyRelu", [features], alpha=self.architecture.negative_slope)

    def conv_norm(self, name: str, features: str, *, stride: Sequence[int], activate: bool = True) -> str:
        convolved = self.conv(f"{name}.conv", features, stride=stride)
        self.voxels //= math.prod(stride)
        result = self.norm(f"{name}.norm", convolved)
        return self.activation(result) if activate else result

    def residual_block(self, name: str, features: str, *, stride: Sequence[int]) -> str:
        inner = self.conv_norm(f"{name}.conv1", features, stride=stride)
        inner = self.conv_norm(f"{name}.conv2", inner, stride=self.one, activate=False)
        skip, position = features, 0
        if any(step != 1 for step in stride):
            skip = self.node("AveragePool", [skip], kernel_shape=list(stride), strides=list(stride))
            position = 1
        if f"{name}.skip.{position}.conv.weight" in self.weights:
            skip = self.conv_norm(f"{name}.skip.{position}", skip, stride=self.one, activate=False)
        return self.activation(self.node("Add", [inner, skip]))
