"""The export alone, from logits on the network's grid to labels on the image's: ours and nnU-Net's in turn.

    python -m benchmarks.export [--json] [--cases NAME ...] [--pairs N] [--growth] [--patch Z Y X] [--threads N]
                                [--work FOLDER] [--out FILE] [--nnunet-python PYTHON]

`export-8`: 8 classes, 300x273x273 to 300x512x512; both read the same file of float16 logits whole, then the clock
starts. nnU-Net's side is its own `convert_predicted_logits_to_segmentation_with_correct_shape`. `export-104`: 104
classes on the same grids, ours alone: the logits are made window by window (`--patch`) and are never held as a whole;
summing windows counts as export, making the logits is reported apart. `--growth`: ours, as `export-104`, at 1, 2 and 4
times the voxels (from 150x137x137 to 150x256x256) and with 2 (one class and the background), 8, 25 and 104 classes.

The first turn warms up and has its memory sampled: proportional set size of the whole tree of processes, logits and
libraries included. `cpu_s`, and the ratios, are of the export, without the start of the process and reading the file;
medians. `--work` keeps files and finished runs: a benchmark that was stopped goes on there. The last line is
`{"cases": [...]}`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.blob_logits import SEED, BlobLogits
from benchmarks.export_own import label_names
from benchmarks.nnunet_plans import ct_plans
from benchmarks.process_tree import ROOT, measure
from benchmarks.turns import (
    OURS,
    THEIRS,
    FinishedRuns,
    Run,
    Tell,
    clean_environment,
    code_digest,
    in_turns,
    last_json,
    machine,
    summarize,
    teller,
    write_report,
)
from engine.resampling import Shape

NETWORK_SPACING_MM, SPACING_MM = (1.0, 1.5, 1.5), (1.0, 0.8, 0.8)
# At most this much of the result is compared at a time.
_PLANES = 16


@dataclass(frozen=True, kw_only=True)
class ExportCase:
    """`is_paired`: nnU-Net runs too, on logits in a file; else ours alone, window by window."""

    name: str
    classes: int
    network_shape: Shape
    shape: Shape
    is_paired: bool = False


CASES = (
    ExportCase(name="export-8", classes=8, network_shape=(300, 273, 273), shape=(300, 512, 512), is_paired=True),
    ExportCase(name="export-104", classes=104, network_shape=(300, 273, 273), shape=(300, 512, 512)),
)
GROWTH = tuple(
    ExportCase(name=f"{voxels}x voxels, {classes} classes", classes=classes, network_shape=inner, shape=outer)
    for classes in (2, 8, 25, 104)
    for voxels, inner, outer in (
        (1, (150, 137, 137), (150, 256, 256)),
        (2, (300, 137, 137), (300, 256, 256)),
        (4, (300, 273, 137), (300, 512, 256)),
    )
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="*", choices=names, default=names)
    parser.add_argument("--pairs", type=int, default=5, help="counted turns, after one that warms up")
    parser.add_argument("--growth", action="store_true", help="also more voxels and classes (one turn each)")
    parser.add_argument("--patch", type=int, nargs=3, default=(128, 128, 128), help="the window of the made logits")
    parser.add_argument("--threads", type=int, default=1, help="ours; nnU-Net's export has one")
    parser.add_argument("--work", type=Path, help="keeps files and finished runs (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="the report, in this file too")
    parser.add_argument(
        "--nnunet-python",
        type=Path,
        default=os.environ.get("SEGGATE_NNUNET_PYTHON", ROOT / ".venv-nnunet" / "bin" / "python"),
    )
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended too
    chosen = [case for case in CASES if case.name in options.cases]
    if any(case.is_paired for case in chosen) and not options.nnunet_python.exists():
        parser.error("run `make nnunet-peer`, or name a Python that has nnunetv2 with --nnunet-python")
    with tempfile.TemporaryDirectory(prefix="seggate-export-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        benchmark = Benchmark(options, work, teller(quiet=options.json))
        report: dict[str, Any] = {"cases": [benchmark.row(case, options.pairs) for case in chosen]}
        if options.growth:
            report["growth"] = [benchmark.row(case, 0) for case in GROWTH]
    report["machine"] = machine()
    write_report(report, options.out)
    return 0


class Benchmark:
    def __init__(self, options: argparse.Namespace, work: Path, tell: Tell) -> None:
        self._options = options
        self._work = work
        self._tell = tell
        self._runs = FinishedRuns(work / "export-runs.jsonl")
        self._is_compiled = False

    def row(self, case: ExportCase, pairs: int) -> dict[str, Any]:
        """One case as the report has it."""
        sides: dict[str, Callable[[bool], Run]] = {OURS: lambda memory: self._ours(case, memory=memory)}
        if case.is_paired:
            self._write_logits(case)
            sides = {THEIRS: lambda memory: self._theirs(case, memory=memory), **sides}
        form = f"seed {SEED}, patch {self._options.patch}, {self._options.threads} threads"
        of = {OURS: f"code {code_digest()}, {form}", THEIRS: f"seed {SEED}"}
        found = in_turns(case.name, sides, pairs=pairs, runs=self._runs, of=of, tell=self._tell)
        own = found[OURS][-1].said
        row = {
            "name": case.name,
            "classes": case.classes,
            "network_shape": case.network_shape,
            "shape": case.shape,
            "threads": self._options.threads,
            "backend": "numba",
            "precision": "float32, rounded to float16 before labels are compared",
            **summarize(found, cpu_s=lambda run: float(run.said["cpu_s"])),
            "ties": own["ties"],
            "process_cpu_s": {side: [round(run.usage.cpu_s, 2) for run in runs[1:]] for side, runs in found.items()},
        }
        # Of the export alone, as its CPU time is: the processes' own start is in `wall_s` no more.
        wall = {side: sorted(float(run.said["wall_s"]) for run in runs[1:] or runs) for side, runs in found.items()}
        row["wall_s"] = wall
        if case.is_paired:
            row["wall_ratio"] = round(_middle(wall[THEIRS]) / _middle(wall[OURS]), 2)
            different, voxels = count_different(*(self._labels(case, side) for side in (THEIRS, OURS)))
            row.update(different_voxels=different, voxels=voxels, voxel_agreement=1 - different / voxels)
        else:
            row.update(
                patch=list(self._options.patch),
                labels_found=own["labels_found"],
                background_share=own["background_share"],
                generator_cpu_s=own["generator_cpu_s"],
            )
        return row

    def _ours(self, case: ExportCase, *, memory: bool) -> Run:
        specification = {
            "classes": case.classes,
            "network_shape": case.network_shape,
            "network_spacing_mm": NETWORK_SPACING_MM,
            "shape": case.shape,
            "spacing_mm": SPACING_MM,
            "threads": self._options.threads,
            "patch": self._options.patch,
        }
        if not self._is_compiled:
            # At their first use kernels are compiled, and kept: a matter of the installation, not of an export.
            tiny = {"classes": 2, "network_shape": (16, 16, 16), "shape": (20, 20, 20), "patch": (16, 16, 16)}
            self._own_process({**specification, **tiny}, memory=False)
            self._is_compiled = True
        if case.is_paired:
            specification |= {"logits": str(self._logits(case)), "labels": str(self._labels(case, OURS))}
        return self._own_process(specification, memory=memory)

    def _own_process(self, specification: dict[str, Any], *, memory: bool) -> Run:
        threads = str(self._options.threads)
        environment = clean_environment(OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads)
        command = [sys.executable, "-m", "benchmarks.export_own", json.dumps(specification)]
        return self._run(command, OURS, environment, memory=memory)

    def _theirs(self, case: ExportCase, *, memory: bool) -> Run:
        plans, dataset = self._work / f"{case.name}-plans.json", self._work / f"{case.name}-dataset.json"
        plans.write_text(json.dumps(ct_plans(spacing_mm=NETWORK_SPACING_MM, patch_size=self._options.patch)))
        dataset.write_text(
            json.dumps(
                {
                    "channel_names": {"0": "CT"},
                    "labels": label_names(case.classes),
                    "numTraining": 1,
                    "file_ending": ".nii.gz",
                }
            )
        )
        arguments = [str(plans), str(dataset), str(self._logits(case)), json.dumps(case.shape), json.dumps(SPACING_MM)]
        script = str(ROOT / "benchmarks" / "nnunet_export.py")
        command = [str(self._options.nnunet_python), script, *arguments, str(self._labels(case, THEIRS))]
        unused = str(self._work / "unused")
        folders = {f"nnUNet_{kind}": unused for kind in ("raw", "preprocessed", "results")}
        environment = {key: value for key, value in clean_environment(**folders).items() if key != "PYTHONPATH"}
        return self._run(command, THEIRS, environment, memory=memory)

    def _run(self, command: list[str], side: str, environment: dict[str, str], *, memory: bool) -> Run:
        log = self._work / f"{side}.log"
        usage = measure(command, log=log, environment=environment, memory=memory)
        return Run(usage=usage, said=last_json(log.read_text(errors="replace")))

    def _write_logits(self, case: ExportCase) -> None:
        """All logits of a case in a file, by planes; it appears whole."""
        file = self._logits(case)
        if file.exists():
            return
        self._tell(f"{case.name}: making the logits")
        partial = file.with_suffix(".partial.npy")
        shape = (case.classes, *case.network_shape)
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        for z, plane in enumerate(BlobLogits(case.classes, case.network_shape).planes()):
            array[:, z] = plane
        array.flush()
        del array
        partial.rename(file)

    def _logits(self, case: ExportCase) -> Path:
        return self._work / f"{case.name}-logits-{SEED}.npy"

    def _labels(self, case: ExportCase, side: str) -> Path:
        return self._work / f"{case.name}-{side}.npy"


def count_different(first: Path, second: Path) -> tuple[int, int]:
    """Voxels that differ in two label maps of one shape, and all; SystemExit where the shapes differ."""
    one, other = (np.load(file, mmap_mode="r") for file in (first, second))
    if one.shape != other.shape:
        raise SystemExit(f"{first.name} is {one.shape}, {second.name} is {other.shape}")
    starts = range(0, one.shape[0], _PLANES)
    different = sum(int(np.count_nonzero(one[z : z + _PLANES] != other[z : z + _PLANES])) for z in starts)
    return different, one.size


def _middle(ordered: list[float]) -> float:
    return float(np.median(ordered))


if __name__ == "__main__":
    sys.exit(main())
