"""engine.torch_backend: an exported network in torch gives what ONNX Runtime gives, from the same file."""
# ruff: noqa: E402

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.architecture import Architecture
from engine.backends import BackendChoice, Network, open_backend
from engine.errors import BackendFailed, BundleInvalid
from engine.network import build_network
from engine.onnx_graph import write_onnx
from tests.support.tiny_models import write_pointwise_network

pytestmark = pytest.mark.peer("torch")
PATCH = (8, 16, 16)


def _architecture(kind: Any, dimensions: Any) -> Architecture:
    return Architecture(
        network=kind,
        dimensions=dimensions,
        features_per_stage=(4, 6, 8),
        kernel_sizes=((3,) * dimensions,) * 3,
        strides=((1,) * dimensions, (2,) * dimensions, (2,) * dimensions),
        n_conv_per_stage=(1, 2, 1),
        n_conv_per_stage_decoder=(1, 1),
        conv_bias=True,
        norm_eps=1e-5,
        negative_slope=0.01,
    )


def _exported(folder: Path, kind: str = "plain", dimensions: int = 3, *, half: bool = False) -> Network:
    architecture, patch = _architecture(kind, dimensions), PATCH[-dimensions:]
    random = np.random.default_rng(0)
    state = build_network(architecture, channels=2, heads=3).state_dict()
    weights = {name: random.normal(0, 0.3, tuple(v.shape)).astype(np.float32) for name, v in state.items()}
    file = folder / "network.onnx"
    write_onnx(file, architecture, weights, channels=2, heads=3, patch_size=patch, half=half)
    return Network(file=file, channels=2, heads=3, patch_size=patch, architecture=architecture)


def _choice(runtime: Any, precision: Any = "float32", **more: Any) -> BackendChoice:
    return BackendChoice(runtime=runtime, provider=more.pop("provider", "cpu"), precision=precision, **more)


@pytest.mark.parametrize(
    ("kind", "dimensions", "half"), [("plain", 3, False), ("residual", 3, True), ("plain", 2, True)]
)
def test_torch_gives_what_onnx_runtime_gives(tmp_path: Path, kind: str, dimensions: int, half: bool) -> None:
    network = _exported(tmp_path, kind, dimensions, half=half)
    windows = np.random.default_rng(1).standard_normal((3, 2, *network.patch_size), dtype=np.float32)
    expected = open_backend(network, _choice("onnxruntime")).run(windows)
    backend = open_backend(network, _choice("torch", batch=2))
    found = backend.run(windows)
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))
    assert (backend.name, backend.provider, backend.precision, backend.batch) == ("torch", "cpu", "float32", 2)
    assert backend.version == torch.__version__


def test_half_precision_is_autocast_and_changes_little(tmp_path: Path) -> None:
    network = _exported(tmp_path)
    windows = np.random.default_rng(1).standard_normal((1, 2, *PATCH), dtype=np.float32)
    expected = open_backend(network, _choice("torch")).run(windows)
    backend = open_backend(network, _choice("torch", "bf16"))
    found = backend.run(windows)
    assert found.dtype == np.float32
    assert 0 < float(np.abs(found - expected).max()) < 0.1 * float(np.abs(expected).max())


def test_a_file_of_another_network_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    network = _exported(tmp_path)
    write_pointwise_network(tmp_path / "other.onnx", np.zeros((3, 2), np.float32), np.zeros(3, np.float32), PATCH)
    other = Network(**{**vars(network), "file": tmp_path / "other.onnx"})
    with pytest.raises(BundleInvalid, match=r"other\.onnx: has no encoder\.stages"):
        open_backend(other, _choice("torch"))
    wider = Network(**{**vars(network), "channels": 5})
    with pytest.raises(BundleInvalid, match="has shape"):
        open_backend(wider, _choice("torch"))


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    network = _exported(tmp_path)
    with pytest.raises(BackendFailed, match="not on TensorRT"):
        open_backend(network, _choice("torch", provider="tensorrt"))
    if not torch.cuda.is_available():
        with pytest.raises(BackendFailed, match="finds no GPU"):
            open_backend(network, _choice("torch", provider="cuda"))


def test_a_closed_backend_does_not_run(tmp_path: Path) -> None:
    backend = open_backend(_exported(tmp_path), _choice("torch"))
    backend.close()
    with pytest.raises(BackendFailed, match="closed"):
        backend.run(np.zeros((1, 2, *PATCH), dtype=np.float32))
