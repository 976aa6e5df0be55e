"""Wall time of a training step: nnU-Net's own trainer and ours, in turns, on one machine.

    python -m benchmarks.train [--nnunet-python PYTHON] [--json] [--steps N] [--rounds N] [--cases N]
                              [--warm-up N] [--plans FILE]

Both train the 3D configuration of `shared/models` on the same hippocampus cases, each with its own loader and
augmentation. A turn is some steps that are not counted, until what was made ahead is used up, and then N that are.
nnU-Net runs twice: as it does by default, with processes that make its batches, and with batches made in between
(`nnUNet_n_proc_DA=0`), which is faster where there are few cores; the faster of the two counts. `step_ratio` is its
median step by ours in half precision, `step_ratio_float32` by ours in float32.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = "3d_fullres"
DATASET = "Dataset004_Hippocampus"
WARM_UP = 10


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument(
        "--nnunet-python",
        type=Path,
        default=os.environ.get("SEGGATE_NNUNET_PYTHON", ROOT / ".venv-nnunet" / "bin" / "python"),
    )
    parser.add_argument("--steps", type=int, default=20, help="counted steps of a turn")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="steps before them; more where a step is short")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plans", type=Path, help="other plans for these cases (default: those of shared/models)")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    if not options.nnunet_python.exists():
        parser.error("run `make nnunet-peer`, or name a Python that has nnunetv2 with --nnunet-python")
    with tempfile.TemporaryDirectory(prefix="seggate-train-") as scratch:
        report = measure(options, Path(scratch))
    print(json.dumps(report))
    return 0


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    shared = Path(os.environ.get("SEGGATE_SHARED", ROOT.parent / "shared"))
    small = shared / "models" / DATASET / f"nnUNetTrainer__nnUNetSmallPlans__{CONFIGURATION}" / "plans.json"
    plans = (options.plans or small).resolve()
    raw = scratch / "raw" / DATASET
    _copy_cases(shared / "data" / DATASET, raw, options.cases)

    def start_nnunet(name: str, **environment: str) -> subprocess.Popen[str]:
        preprocessed = scratch / name / "preprocessed"
        (preprocessed / DATASET).mkdir(parents=True)
        shutil.copy(raw / "dataset.json", preprocessed / DATASET)
        folders = [str(raw.parent), str(preprocessed), str(scratch / name / "results")]
        script = str(ROOT / "benchmarks" / "nnunet_steps.py")
        return _start(
            [str(options.nnunet_python), script, *folders, str(plans), CONFIGURATION, str(options.threads)],
            scratch / f"{name}.log",
            **environment,
        )

    def start_own(precision: str) -> subprocess.Popen[str]:
        arguments = [str(raw), str(plans), CONFIGURATION, precision, str(scratch / precision), str(options.threads)]
        return _start([sys.executable, "-m", "benchmarks.own_steps", *arguments], scratch / f"{precision}.log")

    half = _precision_name()
    runners = {
        "nnunet": start_nnunet("nnunet"),
        "nnunet_in_process": start_nnunet("nnunet_in_process", nnUNet_n_proc_DA="0"),
        half: start_own(half),
        "float32": start_own("float32"),
    }
    logs = {name: scratch / f"{name}.log" for name in runners}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    try:
        for name, runner in runners.items():
            _steps(runner, logs[name], 1)  # all are ready before the first is measured
        for number in range(options.rounds):
            for name, runner in runners.items():
                _steps(runner, logs[name], options.warm_up)
                seconds[name].append(_steps(runner, logs[name], options.steps) / options.steps)
                if not options.json:
                    print(f"round {number}: {name} {seconds[name][-1]:.4f} s a step", file=sys.stderr)
    finally:
        for runner in runners.values():
            _end(runner)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    theirs_s = min(median["nnunet"], median["nnunet_in_process"])
    return {
        "machine": f"{platform.processor() or platform.machine()}, {options.threads} threads",
        "device": _device_name(),
        "plans": json.loads(plans.read_text())["plans_name"],
        "precision": half,
        "steps": options.steps,
        "rounds": options.rounds,
        "step_s": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
        "step_ratio": round(theirs_s / median[half], 3),
        "step_ratio_float32": round(theirs_s / median["float32"], 3),
    }


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "processor"


def _precision_name() -> str:
    import torch

    from engine.training_setup import default_precision

    found = default_precision(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return "bf16" if found == "float32" else found


def _copy_cases(source: Path, target: Path, count: int) -> None:
    """The first cases of the dataset, with a dataset.json that counts them."""
    document = json.loads((source / "dataset.json").read_text())
    for sub in ("imagesTr", "labelsTr"):
        (target / sub).mkdir(parents=True)
    for label in sorted((source / "labelsTr").glob(f"*{document['file_ending']}"))[:count]:
        name = label.name.removesuffix(document["file_ending"])
        shutil.copy(label, target / "labelsTr")
        for image in (source / "imagesTr").glob(f"{name}_????{document['file_ending']}"):
            shutil.copy(image, target / "imagesTr")
    (target / "dataset.json").write_text(json.dumps({**document, "numTraining": count}))


def _start(command: list[str], log: Path, **environment: str) -> subprocess.Popen[str]:
    with log.open("w") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
        )


def _end(runner: subprocess.Popen[str]) -> None:
    """Ends a runner and the processes that make its batches, which hold its standard output open."""
    assert runner.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        runner.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        runner.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(runner.pid, signal.SIGKILL)
    runner.wait()


def _steps(runner: subprocess.Popen[str], log: Path, count: int) -> float:
    """The seconds that `count` steps took. Raises SystemExit, with what the runner said, where it has ended."""
    assert runner.stdin is not None
    assert runner.stdout is not None
    answer = ""
    with contextlib.suppress(BrokenPipeError):
        runner.stdin.write(f"{count}\n")
        runner.stdin.flush()
        answer = runner.stdout.readline()
    if not answer:
        said = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"{runner.args!r}: ended with {runner.wait()}:\n{said}")
    return float(answer)


if __name__ == "__main__":
    sys.exit(main())
