"""Predicts a folder of NIfTI files with a bundle, as one process, for benchmarks/predict.py.

    python -m benchmarks.predict_own -m BUNDLE -i IMAGES -o RESULTS [--disable_tta] [--device cpu|cuda]

The memory that an image needs is measured by the caller, and nothing is refused for want of it. The last line is one
JSON object: `predicted`, `first_window_s` (since the start of the process), `runtime`, and wall time by stage
(`seconds`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil

from engine.bundle import load_bundle
from engine.nifti import read_nifti, write_nifti
from engine.predictor import Predictor

_CHANNEL = "_0000.nii.gz"
_ANY_MEMORY = 2**60


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict_own", description=__doc__)
    parser.add_argument("-m", dest="model", type=Path, required=True)
    parser.add_argument("-i", dest="images", type=Path, required=True)
    parser.add_argument("-o", dest="results", type=Path, required=True)
    parser.add_argument("--disable_tta", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    started = psutil.Process().create_time()
    first_window_s: list[float] = []
    seconds: dict[str, float] = defaultdict(float)

    def progress(share: float) -> None:
        if share > 0 and not first_window_s:
            first_window_s.append(round(time.time() - started, 3))

    bundle = load_bundle(options.model)
    channels = len(bundle.channels)
    cases = sorted(path.name.removesuffix(_CHANNEL) for path in options.images.glob(f"*{_CHANNEL}"))
    options.results.mkdir(parents=True, exist_ok=True)
    with Predictor(bundle, device=options.device) as predictor:
        runtime = predictor.runtime
        for case in cases:
            begun = time.perf_counter()
            volume = read_nifti([options.images / f"{case}_{index:04d}.nii.gz" for index in range(channels)])
            seconds["read"] += time.perf_counter() - begun
            found = predictor.predict(
                volume,
                progress=progress,
                mirroring=False if options.disable_tta else None,
                budget_bytes=_ANY_MEMORY,
            )
            for stage, value in found.runtime.seconds.items():
                seconds[stage] += value
            begun = time.perf_counter()
            write_nifti(found.labels, options.results / f"{case}.nii.gz")
            seconds["write"] += time.perf_counter() - begun
    summary = {
        "predicted": len(cases),
        "first_window_s": first_window_s[0] if first_window_s else None,
        "runtime": runtime,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
