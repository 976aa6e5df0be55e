"""engine.onnx_graph: means of large feature maps are exact in every runtime, and those of small ones stay fast."""
# ruff: noqa: E402

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.architecture import Architecture
from engine.network import build_network
from engine.onnx_backend import OnnxBackend
from engine.onnx_graph import LARGE_VOXELS, write_onnx
from engine.openvino_backend import OpenVinoBackend

FloatArray = NDArray[np.float32]
Kind = Literal["plain", "residual"]
PATCHES = ((48, 64, 64), (400, 384))
RUNTIMES: dict[str, Callable[..., OnnxBackend | OpenVinoBackend]] = {
    "onnxruntime": lambda file, **options: OnnxBackend(file, device="cpu", threads=1, **options),
    "openvino": lambda file, **options: OpenVinoBackend(file, threads=1, **options),
}


def architecture(dimensions: int, network: Kind = "plain") -> Architecture:
    return Architecture(
        network=network,
        dimensions=3 if dimensions == 3 else 2,
        features_per_stage=(4, 6),
        kernel_sizes=((3,) * dimensions,) * 2,
        strides=((1,) * dimensions, (2,) * dimensions),
        n_conv_per_stage=(2, 2),
        n_conv_per_stage_decoder=(2,),
        conv_bias=True,
        norm_eps=1e-5,
        negative_slope=0.01,
    )


def written(file: Path, patch: tuple[int, ...], network: Kind = "plain") -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(1)
    built = build_network(architecture(len(patch), network), channels=1, heads=3).eval()
    weights = {name: value.detach().numpy() for name, value in built.state_dict().items()}
    write_onnx(file, architecture(len(patch), network), weights, channels=1, heads=3, patch_size=patch)
    return file, built


def exact(network: torch.nn.Module, window: FloatArray) -> NDArray[np.float64]:
    with torch.inference_mode():
        answer = network.double()(torch.from_numpy(window).double())
    logits: NDArray[np.float64] = (answer[0] if isinstance(answer, list | tuple) else answer).numpy()
    return logits


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("network", ["plain", "residual"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_large_patch_far_from_0_is_as_exact_as_in_double_precision(
    tmp_path: Path, runtime: str, network: Kind, patch: tuple[int, ...]
) -> None:
    file, built = written(tmp_path / "network.onnx", patch, network)
    window = np.random.default_rng(2).normal(30, 1, (1, 1, *patch)).astype(np.float32)
    found = RUNTIMES[runtime](file, channels=1, patch_size=patch).run(window)
    expected = exact(built, window)
    assert float(np.abs(found - expected).max() / np.abs(expected).max()) < 2e-5


@pytest.mark.parametrize("patch", PATCHES)
def test_only_large_feature_maps_are_written_out(tmp_path: Path, patch: tuple[int, ...]) -> None:
    file, _ = written(tmp_path / "network.onnx", patch)
    kinds = Counter(node.op_type for node in onnx.load(str(file)).graph.node)
    large = 4  # two convolutions before, and two after the lower stage, which is small
    assert np.prod(patch) >= LARGE_VOXELS > np.prod(patch) / 2 ** len(patch)
    assert kinds["InstanceNormalization"] == 2
    assert kinds["ReduceMean"] == 2 * len(patch) * large


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    first, _ = written(tmp_path / "a.onnx", PATCHES[0])
    second, _ = written(tmp_path / "b.onnx", PATCHES[0])
    assert first.read_bytes() == second.read_bytes()
