"""Memory over many predictions of mixed shapes, in a process of its own: prints the resident size, in bytes, after each
hundredth.

python -m tests.support.many_volumes COUNT RUNTIME
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.backends import BackendChoice, Runtime
from engine.predictor import Predictor
from tests.support.peak_memory import Case, bytes_of, image, model

_EVERY = 100
_SMALLEST, _LARGEST = 8, 44


def sizes(count: int, runtime: Runtime) -> list[int]:
    """Edges from 8 to 43 voxels and spacings from 0.8 to 3 mm, drawn anew for each volume; networks of two folds,
    mirrored, on turned images."""
    random = np.random.default_rng(3)
    case = Case(shape=(1, 1, 1), spacing_mm=(1, 1, 1), heads=5, folds=2, patch=(24, 24, 24), orientation="RAS")
    choice = BackendChoice(runtime=runtime, provider="cpu", precision="float32", threads=1)
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Predictor(model(replace(case, mirrored=True), Path(folder)), choice=choice, threads=1) as predictor,
    ):
        for done in range(1, count + 1):
            z, y, x = (int(edge) for edge in random.integers(_SMALLEST, _LARGEST, size=3))
            dz, dy, dx = (float(edge) for edge in random.uniform(0.8, 3.0, size=3))
            predictor.predict(image((z, y, x), (dz, dy, dx)))
            if done % _EVERY == 0:
                gc.collect()
                found.append(bytes_of("VmRSS"))
    return found


if __name__ == "__main__":
    runtime: Runtime = "openvino" if sys.argv[2] == "openvino" else "onnxruntime"
    sys.stdout.write(json.dumps(sizes(int(sys.argv[1]), runtime)) + "\n")
