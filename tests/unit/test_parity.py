"""engine.parity: an exported network is compared with torch on every backend, and other arithmetic is noticed."""
# ruff: noqa: E402

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.peers import require_peer

require_peer("torch")

import onnx
import torch

from engine import backend_figures
from engine.backend_figures import REFERENCE
from engine.checkpoint import load_network, read_checkpoint
from engine.errors import ParityFailed
from engine.labels import LabelManager
from engine.onnx_backend import OnnxBackend
from engine.onnx_graph import write_onnx
from engine.parity import MeasuredNetwork, check_parity, with_rounded_kernels
from engine.plans import Configuration, read_plans
from tests.support.nnunet_results import TrainedModel, dataset_json, plans_json, write_results

LABELS = LabelManager.from_dataset_json(dataset_json(TrainedModel()))


@pytest.fixture
def network(tmp_path: Path) -> Any:
    folder = write_results(tmp_path / "D", TrainedModel())
    checkpoint = read_checkpoint(folder / "fold_0" / "checkpoint_final.pth")
    return load_network(checkpoint, _configuration().architecture, channels=1, heads=3, where="fold 0")


def _configuration() -> Configuration:
    return read_plans(plans_json(TrainedModel())).configurations["3d_fullres"]


def _written(path: Path, network: Any, *, half: bool = False) -> Path:
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    patch = _configuration().patch_size
    write_onnx(path, _configuration().architecture, weights, channels=1, heads=3, patch_size=patch, half=half)
    return path


def _check(network: Any, file: Path, **options: Any) -> MeasuredNetwork:
    return check_parity(network, file, _configuration(), channels=1, label_manager=LABELS, fold="0", **options)


@pytest.mark.parametrize("change", [1.0, 0.001], ids=["grossly", "slightly"])
def test_export_that_computes_something_else_fails(tmp_path: Path, network: Any, change: float) -> None:
    file = _written(tmp_path / "n.onnx", network)
    with torch.no_grad():
        network.decoder.transpconvs[1].weight.mul_(1 + change)
        network.decoder.seg_layers[1].bias[1] += change * 2
    with pytest.raises(ParityFailed, match="onnxruntime on cpu differs from torch"):
        _check(network, file)


def test_only_kernels_are_stored_as_float16_and_all_arithmetic_is_float32(tmp_path: Path, network: Any) -> None:
    graph = onnx.load(_written(tmp_path / "n.onnx", network, half=True)).graph
    half = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    whole = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    assert half
    assert all(name.endswith((".conv.weight", "transpconvs.0.weight", "transpconvs.1.weight", "seg_layers.1.weight"))
               for name in half)  # fmt: skip
    assert {name for name in (*half, *whole) if ".norm." in name} <= whole
    for node in graph.node:
        if node.op_type == "Cast":
            assert node.attribute[0].i == onnx.TensorProto.FLOAT
        else:
            assert not half & set(node.input)


def test_weights_in_fp16_are_proven_against_their_rounded_values_and_measured_against_the_trained(
    tmp_path: Path, network: Any
) -> None:
    plain = _check(network, _written(tmp_path / "a.onnx", network)).parity
    found = _check(network, _written(tmp_path / "b.onnx", network, half=True), weights="fp16").parity
    assert found.max_abs_difference > 10 * plain.max_abs_difference
    rounded = with_rounded_kernels(network)
    exact = _check(rounded, tmp_path / "b.onnx").parity
    assert exact.max_abs_difference < 1e-4
    with torch.no_grad():
        network.decoder.seg_layers[1].bias[1] += 1
    with pytest.raises(ParityFailed, match="differs from torch"):
        _check(network, tmp_path / "b.onnx", weights="fp16")


def test_a_weight_beyond_float16_is_refused_with_its_name(tmp_path: Path, network: Any) -> None:
    with torch.no_grad():
        network.decoder.seg_layers[1].weight[0] = 1e6
    with pytest.raises(ParityFailed, match=r"decoder\.seg_layers\.1\.weight: 1e\+06 is beyond float16"):
        _written(tmp_path / "n.onnx", network, half=True)


class _Other(OnnxBackend):
    """A second backend whose logits are off by `error`."""

    error = 0.0

    @property
    def provider(self) -> str:
        return "other"

    def run(self, batch: Any) -> Any:
        logits = super().run(batch)
        logits[:, 1] += np.float32(self.error)
        return logits


@pytest.mark.requirement("ART-13", open="a GPU")
@pytest.mark.parametrize(("error", "notes"), [(0.0, 0), (0.5, 1)])
def test_another_backend_is_measured_and_a_fault_of_it_is_told_and_recorded(
    tmp_path: Path, network: Any, monkeypatch: pytest.MonkeyPatch, error: float, notes: int
) -> None:
    def other(file: Path, **options: Any) -> _Other:
        return _Other(file, device="cpu", **options)

    monkeypatch.setattr(_Other, "error", error)
    backends = {REFERENCE: backend_figures.BACKENDS[REFERENCE], "another": other}
    monkeypatch.setattr(backend_figures, "BACKENDS", backends)
    found = _check(network, _written(tmp_path / "n.onnx", network))
    assert [figure.provider for figure in found.figures] == ["cpu", "other"]
    assert len(found.notes) == notes
    assert all("onnxruntime on other differs from torch" in note for note in found.notes)
    assert (found.figures[1].max_abs_difference > 0.4) == bool(notes)
    assert found.parity.max_abs_difference == found.figures[0].max_abs_difference
