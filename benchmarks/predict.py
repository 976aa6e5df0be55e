"""`nnUNetv2_predict` and our prediction of the same files, whole processes in turn, on one machine.

    python -m benchmarks.predict [--json] [--cases NAME ...] [--pairs N] [--growth] [--device cpu|cuda] [--work FOLDER]
                                 [--out FILE] [--own COMMAND] [--own-bf16 COMMAND] [--nnunet-python PYTHON]

`hippocampus-40`: 40 volumes in one call, mirrored. `ct-small-net`: a torso CT of 336x303x366 voxels of 1 mm, a small
trained network, not mirrored. `ct-default-net`: the same CT, plan of 3 mm, nnU-Net's default network with weights drawn
from a seed, mirrored. `ct-default-net-bf16`: the same, ours with a tolerance of 0.001 (`--own-bf16`). `whole-104`: ours
alone, once: 104 classes, 512x512x600 voxels, plan of 1.5 mm. `ct-512` (with `--device cuda`): 512x512x300, default
network. `--growth`: ours alone, once, at 1, 2 and 4 times the voxels and with 2 (one class and the background), 8, 25
and 104 classes.

nnU-Net runs with all its defaults. COMMAND is ours, with {model}, {input}, {output}, {device} and {mirroring} (nothing,
or --disable_tta) to be filled in; its last line must be JSON with `runtime` and `first_window_s`.

The first turn warms up and has its memory sampled (proportional set size of the whole tree of processes). Times are
medians of the pairs after it; `wall_ratio` includes the start of the process. Start-up apart: nnU-Net's is the time of
the same command for a folder without images (imports, network, weights), ours the time until the first window is done.
The label maps of the last turn are compared voxel by voxel. `--work` keeps volumes, models and finished runs: a
benchmark that was stopped goes on there. Ratios are nnU-Net's figure by ours. The last line is `{"cases": [...]}`.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.predict_cases import (
    CASES,
    CONFIGURATION,
    GROWTH,
    ON_CPU,
    ON_CUDA,
    Materials,
    PredictCase,
    nnunet_environment,
)
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
from engine.nifti import read_label_map

_ENDING = ".nii.gz"
_RUNTIME = re.compile(r"(?P<backend>\S+ \S+) on (?P<provider>[^,]+), (?P<precision>.+)")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=[case.name for case in CASES], help="default: see above")
    parser.add_argument("--pairs", type=int, help="counted turns (default: 5, of the slow cases 2)")
    parser.add_argument("--growth", action="store_true", help="also more voxels and classes (one turn each)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--work", type=Path, help="keeps volumes, models, finished runs (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="the report, in this file too")
    parser.add_argument("--own", default=default_command(), help="our command (default: %(default)s)")
    parser.add_argument(
        "--own-bf16",
        default=f"{default_command()} --tolerance 0.001",
        help="our command for the cases in bf16 (default: %(default)s)",
    )
    parser.add_argument(
        "--nnunet-python",
        type=Path,
        default=os.environ.get("SEGGATE_NNUNET_PYTHON", ROOT / ".venv-nnunet" / "bin" / "python"),
    )
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended too
    if not options.nnunet_python.exists():
        parser.error("run `make nnunet-peer`, or name a Python that has nnunetv2 with --nnunet-python")
    names = options.cases
    if names is None:
        names = (*(ON_CUDA if options.device == "cuda" else ON_CPU),)
    chosen = [case for case in CASES if case.name in names]
    with tempfile.TemporaryDirectory(prefix="seggate-predict-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        benchmark = Benchmark(options, work.resolve(), teller(quiet=options.json))
        report: dict[str, Any] = {"cases": [benchmark.row(case) for case in chosen]}
        if options.growth:
            report["growth"] = [benchmark.row(case) for case in GROWTH]
    report["machine"] = machine()
    write_report(report, options.out)
    return 0


def default_command() -> str:
    seggate = shlex.quote(str(Path(sys.executable).with_name("seggate")))
    return f"{seggate} predict -i {{input}} -o {{output}} -m {{model}} -device {{device}} {{mirroring}} --json"


class Benchmark:
    def __init__(self, options: argparse.Namespace, work: Path, tell: Tell) -> None:
        self._options = options
        self._work = work
        self._tell = tell
        self._runs = FinishedRuns(work / "predict-runs.jsonl")
        shared = Path(os.environ.get("SEGGATE_SHARED", ROOT.parent / "shared")).resolve()
        self._materials = Materials(work, shared, options.nnunet_python, tell)

    def row(self, case: PredictCase) -> dict[str, Any]:
        """One case as the report has it."""
        images, bundle = self._materials.images(case.volumes), self._materials.bundle(case)
        command = self._options.own_bf16 if case.is_half else self._options.own
        sides: dict[str, Callable[[bool], Run]] = {
            OURS: lambda memory: self._ours(case, command, images, bundle, memory=memory)
        }
        if case.is_paired:
            sides = {THEIRS: lambda memory: self._theirs(case, images, memory=memory), **sides}
        pairs = case.pairs if self._options.pairs is None or not case.is_paired else self._options.pairs
        device = self._options.device
        of = {OURS: f"code {code_digest()}, {command}, {device}", THEIRS: device}
        found = in_turns(case.name, sides, pairs=pairs, runs=self._runs, of=of, tell=self._tell)
        summary = summarize(found, cpu_s=lambda run: run.usage.cpu_s)
        row = {
            "name": case.name,
            "network": case.network,
            "mirroring": case.mirroring,
            **summary,
            **runtime_of(found[OURS][-1].said),
            "stages_s": found[OURS][-1].said.get("seconds"),
        }
        counted = found[OURS][1:] or found[OURS]
        first = [float(run.said["first_window_s"]) for run in counted if run.said.get("first_window_s")]
        start_up = {OURS: round(statistics.median(first), 2)} if first else {}
        if case.is_paired:
            start_up[THEIRS] = self._start_up(case)
            row.update(self._agreement(case))
            if OURS in start_up:
                worked = {side: statistics.median(summary["wall_s"][side]) - start_up[side] for side in sides}
                row["wall_ratio_without_start_up"] = round(worked[THEIRS] / worked[OURS], 2)
        return {**row, "start_up_s": start_up}

    def _ours(self, case: PredictCase, command: str, images: Path, bundle: Path, *, memory: bool) -> Run:
        output = self._emptied(case, OURS)
        values = {
            "model": bundle,
            "input": images,
            "output": output,
            "device": self._options.device,
            "mirroring": "" if case.mirroring else "--disable_tta",
        }
        words = [word.format(**values) for word in shlex.split(command)]
        # The modules beside this file, wherever the command was installed from; plans of this benchmark alone.
        environment = clean_environment(XDG_CACHE_HOME=str(self._work / "cache"))
        return self._run([word for word in words if word], case, OURS, environment, memory=memory)

    def _theirs(self, case: PredictCase, images: Path, *, memory: bool) -> Run:
        return self._nnunet(case, images, self._emptied(case, THEIRS), memory=memory)

    def _nnunet(self, case: PredictCase, images: Path, output: Path, *, memory: bool) -> Run:
        results, dataset, plans = self._materials.results(case)
        command = [str(self._options.nnunet_python.with_name("nnUNetv2_predict")), "-i", str(images), "-o", str(output)]
        command += ["-d", dataset, "-c", CONFIGURATION, "-p", plans, "-f", "0", "-device", self._options.device]
        command += [] if case.mirroring else ["--disable_tta"]
        return self._run(command, case, THEIRS, nnunet_environment(nnUNet_results=str(results)), memory=memory)

    def _start_up(self, case: PredictCase) -> float:
        """nnU-Net's command without images: the median of three, after one that warms up."""
        nothing = self._work / "nothing"
        nothing.mkdir(exist_ok=True)
        output = self._work / "nothing-predicted"

        def run(memory: bool) -> Run:
            return self._nnunet(case, nothing, output, memory=memory)

        name = f"{case.name}, start-up"
        of = {THEIRS: self._options.device}
        found = in_turns(name, {THEIRS: run}, pairs=3, runs=self._runs, of=of, tell=self._tell)[THEIRS]
        return round(statistics.median(run.usage.wall_s for run in found[1:]), 2)

    def _run(
        self, command: list[str], case: PredictCase, side: str, environment: Mapping[str, str], *, memory: bool
    ) -> Run:
        log = self._work / f"{side}.log"
        usage = measure(command, log=log, environment=environment, memory=memory)
        return Run(usage=usage, said=last_json(log.read_text(errors="replace")))

    def _agreement(self, case: PredictCase) -> dict[str, Any]:
        return compare(self._output(case, THEIRS), self._output(case, OURS))

    def _output(self, case: PredictCase, side: str) -> Path:
        return self._work / "results" / case.name / side

    def _emptied(self, case: PredictCase, side: str) -> Path:
        output = self._output(case, side)
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        return output


def compare(theirs: Path, ours: Path) -> dict[str, Any]:
    """Share of the voxels of all label maps that are equal, and of the worst map; SystemExit where files are missing or
    grids differ."""
    names = [sorted(path.name for path in folder.glob(f"*{_ENDING}")) for folder in (theirs, ours)]
    if names[0] != names[1] or not names[0]:
        raise SystemExit(f"nnU-Net wrote {len(names[0])} label maps, we wrote {len(names[1])}; not the same cases")
    different, voxels, worst = 0, 0, 1.0
    for name in names[0]:
        one, other = (read_label_map(folder / name).array for folder in (theirs, ours))
        if one.shape != other.shape:
            raise SystemExit(f"{name}: nnU-Net's label map is {one.shape}, ours {other.shape}")
        count = int(np.count_nonzero(one != other))
        different, voxels = different + count, voxels + one.size
        worst = min(worst, 1 - count / one.size)
    return {
        "voxel_agreement": 1 - different / voxels,
        "worst_volume_agreement": worst,
        "different_voxels": different,
        "voxels": voxels,
    }


def runtime_of(said: Mapping[str, Any]) -> dict[str, str]:
    """`backend` and `precision` from a runtime such as "onnxruntime 1.32.0 on cpu, float32"; "unknown" where our
    command did not say it so."""
    match = _RUNTIME.fullmatch(str(said.get("runtime", "")))
    if match is None:
        return {"backend": "unknown", "precision": "unknown"}
    return {"backend": f"{match['backend']} ({match['provider']})", "precision": match["precision"]}


if __name__ == "__main__":
    sys.exit(main())
