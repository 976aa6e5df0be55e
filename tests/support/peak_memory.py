"""The peak of one prediction, in a process of its own: prints what was estimated and what was measured, in bytes.

python -m tests.support.peak_memory CASE
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends import BackendChoice
from engine.bundle import Bundle
from engine.memory import estimate_peak
from engine.predictor import Predictor
from engine.volume import Geometry, Volume
from tests.support.tiny_models import configuration_json, write_pointwise_network, write_tiny_bundle

Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and an image whose values make every kind of label at every place. Spacings in mm (Z, Y, X)."""

    shape: Shape
    spacing_mm: tuple[float, float, float]
    heads: int = 3
    folds: int = 1
    patch: Shape = (64, 64, 64)
    network_mm: tuple[float, float, float] = (1.5, 1.5, 1.5)
    orientation: str = "as-stored"
    regions: bool = False
    cascade: bool = False
    mirrored: bool = False
    choice: BackendChoice | None = None


def _openvino(batch: int) -> BackendChoice:
    return BackendChoice(runtime="openvino", provider="cpu", precision="float32", threads=1, batch=batch)


CASES = {
    "resampled": Case(shape=(200, 300, 300), spacing_mm=(1.0, 0.8, 0.8)),
    "many classes": Case(shape=(200, 300, 300), spacing_mm=(1.0, 0.8, 0.8), heads=30),
    "folds, turned": Case(shape=(200, 300, 300), spacing_mm=(1.0, 0.8, 0.8), folds=3, orientation="RAS"),
    "regions": Case(shape=(200, 300, 300), spacing_mm=(1.0, 0.8, 0.8), regions=True),
    "cascade": Case(shape=(200, 300, 300), spacing_mm=(1.0, 0.8, 0.8), cascade=True),
    "anisotropic": Case(
        shape=(60, 400, 400),
        spacing_mm=(5.0, 0.8, 0.8),
        heads=8,
        folds=2,
        patch=(16, 128, 128),
        network_mm=(5.0, 0.8, 0.8),
    ),
    "OpenVINO": Case(shape=(200, 300, 300), spacing_mm=(1.0, 0.8, 0.8), heads=8, choice=_openvino(1)),
    "OpenVINO, four mirrored passes at a time": Case(
        shape=(100, 120, 120), spacing_mm=(1.5, 1.5, 1.5), heads=30, mirrored=True, choice=_openvino(4)
    ),
    "ONNX Runtime, four mirrored passes at a time": Case(
        # Answers lie in memory that the runtime keeps from one prediction to the next; so here the rest is most of it.
        shape=(200, 300, 300),
        spacing_mm=(1.0, 0.8, 0.8),
        mirrored=True,
        choice=replace(_openvino(4), runtime="onnxruntime"),
    ),
}


def model(case: Case, root: Path) -> Bundle:
    heads = case.heads
    labels: dict[str, int | list[int]] = {"background": 0, **{f"label {value}": value for value in range(1, heads)}}
    options: dict[str, Any] = {"mirror_axes": (0, 1, 2)} if case.mirrored else {}
    if case.regions:
        labels = {"background": 0, **{f"region {value}": [*range(value, heads + 1)] for value in range(1, heads + 1)}}
        options["regions_class_order"] = list(range(1, heads + 1))
    configurations = {"3d_fullres": configuration_json(case.patch, case.network_mm)}
    if case.cascade:
        coarse = tuple(4 * size for size in case.network_mm)
        configurations = {
            "3d_lowres": configuration_json(case.patch, coarse),
            "3d_cascade_fullres": configuration_json(case.patch, case.network_mm, previous_stage="3d_lowres"),
        }
    random = np.random.default_rng(0)
    for name in configurations:
        channels = heads if name == "3d_cascade_fullres" else 1
        for fold in range(case.folds):
            weights, bias = random.normal(size=(heads, channels)), random.normal(size=heads)
            write_pointwise_network(
                root / name / f"fold_{fold}.onnx",
                weights.astype(np.float32),
                bias.astype(np.float32),
                case.patch,
                batch="batch",
            )
    return write_tiny_bundle(
        root, labels=labels, configurations=configurations, orientation=case.orientation, **options
    )


def image(shape: Shape, spacing_mm: tuple[float, float, float]) -> Volume:
    z, y, x = spacing_mm
    array = np.random.default_rng(1).normal(1, 1, size=(1, *shape)).astype(np.float32)
    return Volume(array=array, geometry=Geometry(shape=shape, affine_lps=np.diag([x, y, z, 1.0])))


def bytes_of(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise ValueError(key)


def measure(case: Case) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        bundle = model(case, Path(folder))
        with Predictor(bundle, device="cpu", threads=1, choice=case.choice) as predictor:
            predictor.predict(image(case.patch, case.network_mm))  # loops are compiled, networks have run
            volume = image(case.shape, case.spacing_mm)
            batch = 1 if case.choice is None else case.choice.batch
            estimate = estimate_peak(bundle, volume.geometry, batch=batch)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = bytes_of("VmRSS")
            predictor.predict(volume)
            return {"estimated": estimate.working_bytes, "measured": bytes_of("VmHWM") - before}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(CASES[sys.argv[1]])) + "\n")
