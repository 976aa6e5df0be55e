"""`seggate plan` and nnU-Net's `nnUNetv2_plan_and_preprocess`, the whole commands in turns, on one machine.

    python -m benchmarks.plan [--nnunet-python PYTHON] [--json] [--rounds N] [--ct-rounds N] [--processes N]

Two datasets: the hippocampus cases of the shared data, and its torso CT on three grids, the largest of 25 million
voxels (`large`, 1.14 mm; the plans resample it to the 1.5 mm of `own`; `thick` has slices of 5 mm). Both commands do
all that they do by default, with as many processes. The first turn warms up, its memory is sampled, and what it wrote
is compared: images to 1e-5, labels voxel by voxel, fingerprints to 1e-6; another result ends the benchmark. Times are
medians of the turns after it, which are not sampled. Start-up is the time of `--help`.

The last line is one JSON object. Ratios are nnU-Net's figure by ours: `wall_ratio` of the hippocampus cases,
`cpu_ratio` of the CT, `peak_pss_ratio` the smaller of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.process_tree import ROOT, Usage, measure
from engine.dataset import DATASET_JSON, read_dataset_json
from engine.fingerprint import FINGERPRINT_JSON
from engine.preprocessed import case_names, open_case
from tests.support.ct_set import write_ct_set

HIPPOCAMPUS, TORSO = "Dataset004_Hippocampus", "Dataset900_Torso"
TORSO_SPACINGS_MM = {"large": (1.14, 1.14, 1.14), "own": (1.5, 1.5, 1.5), "thick": (1.5, 1.5, 5.0)}  # x, y, z
PLANS_JSON = "nnUNetPlans.json"
OURS, THEIRS = "seggate", "nnunet"
MOST_IMAGE, MOST_NUMBER = 1e-5, 1e-6


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument(
        "--nnunet-python",
        type=Path,
        default=os.environ.get("SEGGATE_NNUNET_PYTHON", ROOT / ".venv-nnunet" / "bin" / "python"),
    )
    parser.add_argument("--rounds", type=int, default=3, help="counted turns with the hippocampus cases")
    parser.add_argument("--ct-rounds", type=int, default=1, help="counted turns with the CT")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    if not options.nnunet_python.exists():
        parser.error("run `make nnunet-peer`, or name a Python that has nnunetv2 with --nnunet-python")
    with tempfile.TemporaryDirectory(prefix="seggate-plan-") as scratch:
        report = Benchmark(options, Path(scratch)).report()
    print(json.dumps(report))
    return 0


class Benchmark:
    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self._options = options
        self._scratch = scratch
        (scratch / "raw").mkdir()

    def report(self) -> dict[str, Any]:
        shared_data = Path(os.environ.get("SEGGATE_SHARED", ROOT.parent / "shared")) / "data"
        load = [os.getloadavg()[0]]
        (self._scratch / "raw" / HIPPOCAMPUS).symlink_to((shared_data / HIPPOCAMPUS).resolve())
        start_up = {name: self._start_up(name) for name in (THEIRS, OURS)}
        hippocampus = self._dataset(HIPPOCAMPUS, self._options.rounds)
        write_ct_set(self._scratch / "raw" / TORSO, shared_data, spacings_mm=TORSO_SPACINGS_MM, whole=True)
        ct = self._dataset(TORSO, self._options.ct_rounds)
        load.append(os.getloadavg()[0])
        worked = {name: statistics.median(hippocampus["wall_s"][name]) - start_up[name] for name in start_up}
        return {
            "wall_ratio": hippocampus["wall_ratio"],
            "cpu_ratio": ct["cpu_ratio"],
            "peak_pss_ratio": min(hippocampus["peak_pss_ratio"], ct["peak_pss_ratio"]),
            "wall_ratio_without_start_up": round(worked[THEIRS] / worked[OURS], 2),
            "start_up_s": {name: round(value, 2) for name, value in start_up.items()},
            "hippocampus": hippocampus,
            "ct": ct,
            "processes": self._options.processes,
            "machine": {
                "cpu": _cpu_name(),
                "cpus": os.cpu_count(),
                "python": platform.python_version(),
                "system": platform.platform(),
                "load": [round(value, 1) for value in load],
            },
        }

    def _dataset(self, name: str, rounds: int) -> dict[str, Any]:
        outputs = {who: self._scratch / who for who in (THEIRS, OURS)}
        sampled = {who: self._turn(who, name, outputs[who], memory=True) for who in outputs}
        agreement = compare(outputs[OURS] / name, outputs[THEIRS] / name)
        turns: list[dict[str, Usage]] = []
        for _ in range(rounds):
            turns.append({who: self._turn(who, name, outputs[who], memory=False) for who in outputs})
        for output in outputs.values():
            shutil.rmtree(output)
        return {**summarize(turns, sampled), **agreement}

    def _turn(self, who: str, name: str, output: Path, *, memory: bool) -> Usage:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        processes = str(self._options.processes)
        if who == OURS:
            folders = [str(self._scratch / "raw" / name), "--preprocessed", str(output)]
            arguments = [*folders, "--processes", processes, "--json"]
        else:
            arguments = ["-d", str(int(name[7:10])), "-np", processes, "-npfp", processes, "--no_pbar"]
        usage = self._run(who, arguments, preprocessed=output, memory=memory)
        if not self._options.json:
            sys.stderr.write(f"{name}: {who}: {usage}\n")
        return usage

    def _start_up(self, who: str) -> float:
        """Median of three, after one that warms up."""
        return statistics.median([self._run(who, ["--help"]).wall_s for _ in range(4)][1:])

    def _run(self, who: str, arguments: list[str], *, preprocessed: Path | None = None, memory: bool = False) -> Usage:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "nnUNet_"))}
        if who == OURS:
            command = [str(Path(sys.executable).with_name("seggate")), "plan"]
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "fhir")])
        else:
            command = [str(Path(self._options.nnunet_python).with_name("nnUNetv2_plan_and_preprocess"))]
            for kind, folder in (("raw", self._scratch / "raw"), ("preprocessed", preprocessed), ("results", None)):
                environment[f"nnUNet_{kind}"] = str(folder or self._scratch / "unused")
        log = self._scratch / f"{who}.log"
        return measure([*command, *arguments], log=log, environment=environment, memory=memory)


def summarize(turns: list[dict[str, Usage]], sampled: Mapping[str, Usage]) -> dict[str, Any]:
    """Figures of all turns and the ratios of their medians; memory from the turn that was sampled."""
    wall_s, cpu_s = (
        {who: [round(getattr(turn[who], field), 2) for turn in turns] for who in sampled}
        for field in ("wall_s", "cpu_s")
    )
    peak = {who: usage.peak_pss_mb for who, usage in sampled.items()}
    return {
        "wall_ratio": round(statistics.median(wall_s[THEIRS]) / statistics.median(wall_s[OURS]), 2),
        "cpu_ratio": round(statistics.median(cpu_s[THEIRS]) / statistics.median(cpu_s[OURS]), 2),
        "peak_pss_ratio": round(peak[THEIRS] / peak[OURS], 2),
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "peak_pss_mb": {who: round(value) for who, value in peak.items()},
        "samples_per_s": {who: round(usage.samples_per_s, 1) for who, usage in sampled.items()},
    }


def compare(ours: Path, theirs: Path) -> dict[str, Any]:
    """How far two folders of preprocessed data lie apart; SystemExit where they are not equal."""
    labels = read_dataset_json(ours / DATASET_JSON).labels
    plans, their_plans = (json.loads((folder / PLANS_JSON).read_text()) for folder in (ours, theirs))
    fingerprint, their_fingerprint = (json.loads((folder / FINGERPRINT_JSON).read_text()) for folder in (ours, theirs))
    number = max(
        largest_difference(plans, their_plans),
        largest_difference({key: fingerprint[key] for key in their_fingerprint}, their_fingerprint),
    )
    image, voxels, cases, whole = 0.0, 0, 0, (slice(None),) * 4
    for configuration in plans["configurations"].values():
        folders = [folder / configuration["data_identifier"] for folder in (ours, theirs)]
        names = case_names(folders[0])
        if names != case_names(folders[1]):
            raise SystemExit(f"{folders[0].name}: other cases than nnU-Net's")
        for name in names:
            own, other = (open_case(folder, name, labels) for folder in folders)
            if own.image_CZYX.shape != other.image_CZYX.shape:
                raise SystemExit(f"{folders[0].name}/{name}: {own.image_CZYX.shape}, not {other.image_CZYX.shape}")
            image = max(image, float(np.abs(own.image_CZYX[whole] - other.image_CZYX[whole]).max()))
            voxels += int(np.count_nonzero(own.labels_1ZYX[whole] != other.labels_1ZYX[whole]))
        cases += len(names)
    if image > MOST_IMAGE or voxels or number > MOST_NUMBER:
        raise SystemExit(f"not nnU-Net's result: images {image:.2g}, labels {voxels} voxels, fingerprint {number:.2g}")
    return {"cases_compared": cases, "image_difference": image, "label_voxels": voxels, "number_difference": number}


def largest_difference(one: Any, other: Any) -> float:
    """The largest relative difference of two numbers in two JSON documents; infinite where anything else differs."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return max((largest_difference(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max((largest_difference(*pair) for pair in zip(one, other, strict=True)), default=0.0)
    if one == other:
        return 0.0
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other)):
        return float(abs(one - other) / max(abs(one), abs(other)))
    return float("inf")


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
