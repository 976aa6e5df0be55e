from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from engine.backends import OnnxBackend
from engine.errors import BackendFailed, BundleInvalid
from tests.support.tiny_models import write_pointwise_network

PATCH = (4, 5, 6)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """Two heads over two channels: the sum plus 1, and the difference."""
    path = tmp_path / "network.onnx"
    weights = np.array([[1, 1], [1, -1]], dtype=np.float32)
    write_pointwise_network(path, weights, np.array([1, 0], dtype=np.float32), PATCH)
    return path


def test_a_batch_goes_through_on_the_cpu(network: Path) -> None:
    backend = OnnxBackend(network, channels=2, patch_size=PATCH, device="cpu", threads=1)
    batch = np.stack([np.full(PATCH, 5.0), np.full(PATCH, 2.0)])[None].astype(np.float32)
    logits = backend.run(batch)
    assert logits.shape == (1, 2, *PATCH)
    assert logits.dtype == np.float32
    assert np.unique(logits[0, 0]).tolist() == [8.0]
    assert np.unique(logits[0, 1]).tolist() == [3.0]
    assert (backend.name, backend.provider, backend.precision, backend.threads) == ("onnxruntime", "cpu", "float32", 1)
    assert backend.version == onnxruntime.__version__


def test_auto_without_a_working_gpu_takes_the_cpu_and_says_why(
    network: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with caplog.at_level(logging.DEBUG, logger="engine.backends"):
        backend = OnnxBackend(network, channels=2, patch_size=PATCH, device="auto")
    assert backend.provider == "cpu"
    assert "CUDA is not used" in caplog.text
    assert "no CUDA provider" in caplog.text
    assert {r.levelno for r in caplog.records} == {logging.DEBUG}  # it is what was installed, for every fold


class ListedButAbsent:
    """A runtime that lists CUDA and then computes on the CPU, as ONNX Runtime does without a driver."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        session = onnxruntime.InferenceSession

        def open_session(path: str, options: object, providers: list[object]) -> object:
            return session(path, options, providers=["CPUExecutionProvider"])

        monkeypatch.setattr(
            onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
        )
        monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)


def test_a_listed_provider_that_did_not_start_does_not_count(
    network: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ListedButAbsent(monkeypatch)
    with caplog.at_level(logging.INFO, logger="engine.backends"):
        backend = OnnxBackend(network, channels=2, patch_size=PATCH, device="auto")
    assert backend.provider == "cpu"
    assert "did not start" in caplog.text
    with pytest.raises(BackendFailed, match="CUDA was asked for"):
        OnnxBackend(network, channels=2, patch_size=PATCH, device="cuda")


def test_another_shape_is_refused_before_it_reaches_the_runtime(network: Path) -> None:
    backend = OnnxBackend(network, channels=2, patch_size=PATCH, device="cpu")
    with pytest.raises(BackendFailed, match="takes float32"):
        backend.run(np.zeros((1, 2, 4, 5, 7), dtype=np.float32))
    with pytest.raises(BackendFailed, match="takes float32"):
        backend.run(np.zeros((1, 2, *PATCH), dtype=np.float64))


def test_a_network_that_does_not_fit_the_plans_is_refused(network: Path) -> None:
    with pytest.raises(BundleInvalid, match="the plans say"):
        OnnxBackend(network, channels=1, patch_size=PATCH, device="cpu")
    with pytest.raises(BundleInvalid, match="the plans say"):
        OnnxBackend(network, channels=2, patch_size=(4, 5), device="cpu")


def test_a_file_that_is_no_network_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    with pytest.raises(BundleInvalid, match=r"broken\.onnx: not loadable"):
        OnnxBackend(tmp_path / "broken.onnx", channels=1, patch_size=PATCH, device="cpu")


def test_a_closed_backend_does_not_run(network: Path) -> None:
    backend = OnnxBackend(network, channels=2, patch_size=PATCH, device="cpu")
    backend.close()
    with pytest.raises(BackendFailed, match="closed"):
        backend.run(np.zeros((1, 2, *PATCH), dtype=np.float32))
