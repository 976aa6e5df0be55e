"""engine.backend_probe: a backend is there when it has computed the right numbers, and not before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from engine import backend_probe
from engine.backend_probe import PROBE_ARCHITECTURE, PROBE_FILE, PROBE_PATCH, available_backends, probe
from engine.errors import BackendFailed
from tests.support.peers import ROOT, require_peer


@pytest.fixture(autouse=True)
def _asked_anew() -> None:
    probe.cache_clear()


def test_the_probe_is_the_network_that_its_architecture_says(tmp_path: Path) -> None:
    """Seeded weights, so that the file can be written again."""
    require_peer("torch")
    from engine.network import build_network
    from engine.onnx_graph import write_onnx

    random = np.random.default_rng(0)
    state = build_network(PROBE_ARCHITECTURE, channels=1, heads=2).state_dict()
    weights = {name: random.normal(0.0, 1.0, tuple(value.shape)).astype(np.float32) for name, value in state.items()}
    write_onnx(tmp_path / "probe.onnx", PROBE_ARCHITECTURE, weights, channels=1, heads=2, patch_size=PROBE_PATCH)
    assert PROBE_FILE.read_bytes() == (tmp_path / "probe.onnx").read_bytes()


def test_what_is_installed_here_computes_and_is_named() -> None:
    found = {(s.runtime, s.precision): s for s in available_backends("cpu", runtimes=["onnxruntime", "openvino"])}
    for runtime in ("onnxruntime", "openvino"):
        status = found[runtime, "float32"]
        assert status.is_available, status.reason
        assert status.version in str(status)
    bf16 = found["openvino", "bf16"]
    assert bf16.is_available or bf16.reason


@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_only_what_the_device_allows_is_tried(device: str) -> None:
    found = available_backends(device, runtimes=["onnxruntime"])  # type: ignore[arg-type]
    providers = {status.provider for status in found}
    assert providers == {"cpu": {"cpu"}, "cuda": {"cuda", "tensorrt"}, "auto": {"cpu", "cuda", "tensorrt"}}[device]


def test_a_provider_that_is_listed_and_computes_on_the_cpu_instead_is_not_available(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = onnxruntime.InferenceSession
    listed = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: session(path, options, providers=["CPUExecutionProvider"]),
    )
    for provider in ("cuda", "tensorrt"):
        status = probe("onnxruntime", provider, "float32")
        assert not status.is_available
        assert "did not start" in str(status.reason)


def test_wrong_numbers_are_not_an_available_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_probe, "probe_image", lambda: np.ones((1, 1, *PROBE_PATCH), dtype=np.float32))
    status = probe("onnxruntime", "cpu", "float32")
    assert "something else than it should" in str(status.reason)
    assert status.version == onnxruntime.__version__


def test_a_runtime_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise BackendFailed("no such instruction")

    monkeypatch.setattr(backend_probe, "open_backend", fails)
    assert probe("openvino", "cpu", "float32").reason == "no such instruction"


def test_a_package_that_is_missing_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_probe, "find_spec", lambda _name: None)
    assert probe("openvino", "cpu", "float32").reason == "is not installed"
    assert "extra `train`" in str(probe("torch", "cuda", "float32").reason)


def test_torch_is_not_imported_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_probe, "_DRIVERS", ())
    assert probe("torch", "cuda", "float32").reason == "no NVIDIA driver is loaded"


_LIGHT = """
import sys
import engine.predictor, engine.backends, engine.bundle_networks
heavy = {"torch", "openvino", "onnx", "onnxruntime"} & set(sys.modules)
assert not heavy, heavy
from engine.backend_probe import probe
assert probe("openvino", "cpu", "float32").is_available
reporting = [name for name in sys.modules if "telemetry" in name or name.startswith("openvino.tools.ovc")]
assert not reporting, reporting
assert "torch" not in sys.modules and "onnxruntime" not in sys.modules
"""


def test_each_runtime_is_imported_when_it_is_opened_and_openvino_without_what_reports_to_the_outside() -> None:
    ran = subprocess.run([sys.executable, "-c", _LIGHT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
