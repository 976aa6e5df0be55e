"""Our export alone, for benchmarks/export.py, in a process of its own.

    python -m benchmarks.export_own SPECIFICATION

SPECIFICATION is JSON: `classes`, `network_shape`, `network_spacing_mm`, `shape`, `spacing_mm`, `threads`, and either
`logits`, a file of float16 (classes, Z, Y, X) that is read whole before the clock starts, or `patch`, with which the
logits are made window by window and go through the engine's stream (sums count as export, making the logits does not).
`labels`: the file for the result. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from benchmarks.blob_logits import BlobLogits, BlobNetwork
from engine.labels import LabelManager
from engine.logit_source import LogitSource, NetworkLogits, StoredLogits
from engine.logit_stream import LogitStream
from engine.logits_to_labels import label_image
from engine.plans import ResamplingKwargs
from engine.row_threads import RowThreads
from engine.sliding_window import WindowGrid

# nnU-Net's default for probabilities, which are logits.
RULE = ResamplingKwargs(function="default", order=1, order_z=0, force_separate_z=None, is_seg=False)


def main() -> int:
    print(json.dumps(export(json.loads(sys.argv[1]))))
    return 0


def export(specification: dict[str, Any]) -> dict[str, Any]:
    classes = int(specification["classes"])
    inner, shape = tuple(specification["network_shape"]), tuple(specification["shape"])
    labels = label_manager(classes)
    network: BlobNetwork | None = None
    with RowThreads(specification["threads"]) as threads:
        source: LogitSource
        if "logits" in specification:
            logits = np.load(specification["logits"])
            source = StoredLogits(
                NetworkLogits(logits=logits, spacing_mm=tuple(specification["network_spacing_mm"]), rule=RULE)
            )
        else:
            grid = WindowGrid(shape=inner, patch_size=tuple(specification["patch"]), step_size=0.5)
            network = BlobNetwork(BlobLogits(classes, inner), grid)
            source = LogitStream(
                np.zeros((1, *inner), dtype=np.float32),
                grid,
                [network],
                labels=labels,
                spacing_mm=tuple(specification["network_spacing_mm"]),
                rule=RULE,
                threads=threads,
            )
        cpu, wall = time.process_time(), time.perf_counter()
        found = label_image([source], shape, specification["spacing_mm"], labels, threads)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if "labels" in specification:
        np.save(specification["labels"], found.labels)
    counts = np.zeros(classes, dtype=np.int64)
    for plane in found.labels:  # bincount makes 8 bytes of each label: of the whole it would be the peak
        counts += np.bincount(plane.ravel(), minlength=classes)
    made_cpu, made_wall = (network.cpu_s, network.wall_s) if network is not None else (0.0, 0.0)
    return {
        "cpu_s": round(cpu - made_cpu, 3),
        "wall_s": round(wall - made_wall, 3),
        "generator_cpu_s": round(made_cpu, 3),
        "generator_wall_s": round(made_wall, 3),
        "ties": found.ties,
        "labels_found": int(np.count_nonzero(counts)),
        "background_share": round(float(counts[0] / counts.sum()), 4),
    }


def label_manager(classes: int) -> LabelManager:
    return LabelManager.from_dataset_json({"labels": label_names(classes)})


def label_names(classes: int) -> dict[str, int]:
    """dataset.json's `labels` for so many classes, the background among them."""
    return {"background": 0, **{f"class {value}": value for value in range(1, classes)}}


if __name__ == "__main__":
    sys.exit(main())
