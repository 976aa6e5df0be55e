"""engine.backends and engine.onnx_backend: batches of a fixed shape through ONNX Runtime, where it really computes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from engine.errors import BackendFailed, BundleInvalid
from engine.onnx_backend import OnnxBackend, _BoundBuffers
from gateway.demo.story import model_folder
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
    with caplog.at_level(logging.DEBUG, logger="engine.onnx_backend"):
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
    with caplog.at_level(logging.INFO, logger="engine.onnx_backend"):
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


def test_any_number_of_windows_is_run_in_pieces_of_the_batch_and_the_rest_one_by_one(tmp_path: Path) -> None:
    demo = model_folder() / "3d_fullres" / "fold_0.onnx"
    windows = np.random.default_rng(0).standard_normal((5, 1, 40, 56, 40), dtype=np.float32)
    single = OnnxBackend(demo, channels=1, patch_size=(40, 56, 40), device="cpu", threads=1)
    pairs = OnnxBackend(demo, channels=1, patch_size=(40, 56, 40), device="cpu", threads=1, batch=2)
    assert (single.batch, pairs.batch) == (1, 2)
    expected = np.concatenate([single.run(window[None]) for window in windows])
    np.testing.assert_allclose(single.run(windows), expected, atol=1e-3)
    np.testing.assert_allclose(pairs.run(windows), expected, atol=1e-3)


def test_a_batch_that_the_network_cannot_take_is_refused_when_it_is_opened(network: Path) -> None:
    with pytest.raises(BundleInvalid, match="the plans say"):
        OnnxBackend(network, channels=2, patch_size=PATCH, device="cpu", batch=2)


def test_bound_buffers_give_what_an_unbound_run_gives_and_an_answer_outlives_the_next(network: Path) -> None:
    """The same binding that CUDA gets, on the CPU's memory."""
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    bound = _BoundBuffers(onnxruntime, session, (1, 2, *PATCH), heads=2, device="cpu")
    random = np.random.default_rng(0)
    batches = [random.standard_normal((1, 2, *PATCH), dtype=np.float32) for _ in range(2)]
    answers = [bound.run(batch) for batch in batches]
    for batch, answer in zip(batches, answers, strict=True):
        np.testing.assert_array_equal(answer, session.run(None, {"image": batch})[0])


@pytest.mark.parametrize(("device", "precision"), [("cpu", "bf16"), ("cpu", "fp16"), ("cuda", "fp16")])
def test_a_precision_that_onnx_runtime_has_not_is_refused(network: Path, device: Any, precision: Any) -> None:
    with pytest.raises(BackendFailed, match="does not compute in"):
        OnnxBackend(network, channels=2, patch_size=PATCH, device=device, precision=precision)
