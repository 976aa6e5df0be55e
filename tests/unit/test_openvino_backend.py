"""engine.openvino_backend: the same file in OpenVINO, in the precision and shape that was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backend_probe import probe
from engine.errors import BackendFailed, BundleInvalid
from engine.onnx_backend import OnnxBackend
from engine.openvino_backend import OpenVinoBackend, _core, openvino_runtime
from gateway.demo.story import model_folder
from tests.support.peers import ROOT
from tests.support.tiny_models import write_pointwise_network

PATCH = (4, 5, 6)
DEMO = model_folder() / "3d_fullres" / "fold_0.onnx"
DEMO_PATCH = (40, 56, 40)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    path = tmp_path / "network.onnx"
    weights = np.array([[1, 1], [1, -1]], dtype=np.float32)
    write_pointwise_network(path, weights, np.array([1, 0], dtype=np.float32), PATCH)
    return path


def _windows(count: int) -> Any:
    return np.random.default_rng(0).standard_normal((count, 1, *DEMO_PATCH), dtype=np.float32)


def test_a_batch_goes_through_and_the_backend_says_what_it_is(network: Path) -> None:
    backend = OpenVinoBackend(network, channels=2, patch_size=PATCH, threads=1)
    batch = np.stack([np.full(PATCH, 5.0), np.full(PATCH, 2.0)])[None].astype(np.float32)
    logits = backend.run(batch)
    assert logits.dtype == np.float32
    assert np.unique(logits[0, 0]).tolist() == [8.0]
    assert np.unique(logits[0, 1]).tolist() == [3.0]
    assert (backend.name, backend.provider, backend.precision, backend.threads) == ("openvino", "cpu", "float32", 1)
    assert openvino_runtime().__version__.startswith(backend.version)


def test_float32_is_float32_also_where_the_processor_has_bf16() -> None:
    """Against ONNX Runtime on a trained network: bf16 would be off by a thousand times as much."""
    expected = OnnxBackend(DEMO, channels=1, patch_size=DEMO_PATCH, device="cpu", threads=2).run(_windows(3))
    found = OpenVinoBackend(DEMO, channels=1, patch_size=DEMO_PATCH, threads=2, batch=2).run(_windows(3))
    assert float(np.abs(found - expected).max()) < 1e-4 * float(np.abs(expected).max())
    assert np.array_equal(found.argmax(1), expected.argmax(1))


def test_bf16_is_bf16_and_says_so() -> None:
    if not probe("openvino", "cpu", "bf16").is_available:
        pytest.skip("this processor has no bf16")
    backend = OpenVinoBackend(DEMO, channels=1, patch_size=DEMO_PATCH, precision="bf16")
    exact = OpenVinoBackend(DEMO, channels=1, patch_size=DEMO_PATCH)
    found, expected = backend.run(_windows(1)), exact.run(_windows(1))
    assert backend.precision == "bf16"
    assert 1e-4 < float(np.abs(found - expected).max()) / float(np.abs(expected).max()) < 0.1


def test_an_answer_outlives_the_next_batch(network: Path) -> None:
    backend = OpenVinoBackend(network, channels=2, patch_size=PATCH)
    first = backend.run(np.ones((1, 2, *PATCH), dtype=np.float32))
    backend.run(np.zeros((1, 2, *PATCH), dtype=np.float32))
    assert float(first[0, 0].max()) == 3.0


def test_what_computes_in_another_precision_than_asked_for_is_refused(
    network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a processor without bf16 would: the runtime takes another precision and does not say so."""
    compiled = openvino_runtime().Core.compile_model

    def silently_f32(self: Any, model: Any, device: str, options: dict[str, Any]) -> Any:
        return compiled(self, model, device, {**options, "INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(openvino_runtime().Core, "compile_model", silently_f32)
    with pytest.raises(BackendFailed, match="computes in f32 here, not in bf16"):
        OpenVinoBackend(network, channels=2, patch_size=PATCH, precision="bf16")
    with pytest.raises(BackendFailed, match="does not compute in fp16"):
        OpenVinoBackend(network, channels=2, patch_size=PATCH, precision="fp16")


@pytest.mark.parametrize(("channels", "patch"), [(1, PATCH), (2, (4, 5)), (2, (4, 5, 7))])
def test_a_network_that_does_not_fit_the_plans_is_refused(network: Path, channels: int, patch: Any) -> None:
    with pytest.raises(BundleInvalid, match="the plans say"):
        OpenVinoBackend(network, channels=channels, patch_size=patch)


def test_a_file_that_is_no_network_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    with pytest.raises(BundleInvalid, match=r"broken\.onnx: not loadable by OpenVINO"):
        OpenVinoBackend(tmp_path / "broken.onnx", channels=1, patch_size=PATCH)


def test_another_shape_and_a_closed_backend_are_refused(network: Path) -> None:
    backend = OpenVinoBackend(network, channels=2, patch_size=PATCH)
    with pytest.raises(BackendFailed, match="takes float32"):
        backend.run(np.zeros((1, 2, 4, 5, 7), dtype=np.float32))
    backend.close()
    with pytest.raises(BackendFailed, match="closed"):
        backend.run(np.zeros((1, 2, *PATCH), dtype=np.float32))


def test_a_signal_reaches_its_handler_after_the_last_network_was_freed_in_another_thread(network: Path) -> None:
    """The plugin unmaps then what it gave its thread as a stack for signals, on which Python's handlers run."""
    script = f"""
import faulthandler, gc, signal, threading
from pathlib import Path
from engine.openvino_backend import OpenVinoBackend
faulthandler.enable()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
held = [OpenVinoBackend(Path({str(network)!r}), channels=2, patch_size={PATCH})]
freeing = threading.Thread(target=lambda: (held.clear(), gc.collect()))
freeing.start()
freeing.join()
signal.raise_signal(signal.SIGTERM)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "handled\n"), ran.stderr


def test_a_plugin_that_cannot_be_loaded_is_told(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: Any) -> Any:
        raise RuntimeError("libopenvino_intel_cpu_plugin.so: cannot open")

    _core.cache_clear()
    monkeypatch.setattr(openvino_runtime().Core, "get_property", damaged)
    with pytest.raises(BackendFailed, match="no CPU plugin that can be loaded: libopenvino_intel_cpu_plugin"):
        OpenVinoBackend(network, channels=2, patch_size=PATCH)
