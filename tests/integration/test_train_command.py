"""`seggate train`: what it leaves behind, how it is stopped, and that it goes on."""
# ruff: noqa: E402

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.peers import ROOT, require_peer

require_peer("torch")

import torch

from engine.training_checkpoint import BEST, FINAL, LATEST, read_state
from engine.training_lock import training_lock
from tests.support.tiny_experiment import NAME, planned, seggate, shown
from tests.support.tiny_training import same_weights

MODEL = f"results/{NAME}/nnUNetTrainer__nnUNetPlans__3d_fullres"
SHORT = ("--epochs", "2", "--iterations", "2", "--deterministic", "--precision", "float32", "--threads", "1")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with fold 0 trained, uninterrupted."""
    root = tmp_path_factory.mktemp("trained")
    ran = seggate(root, "train", str(planned(root)), "--fold", "0", *SHORT)
    assert ran.exit_code == 0, ran.output
    return root


def test_a_fold_leaves_checkpoints_validation_log_pictures_and_a_report(trained: Path) -> None:
    model = trained / MODEL
    fold = model / "fold_0"
    assert {path.name for path in model.iterdir()} == {
        "dataset.json",
        "dataset_fingerprint.json",
        "fold_0",
        "plans.json",
        "report.html",
    }
    assert {FINAL, BEST, "training_log.txt", "training_log.jsonl", "training.json"} <= {p.name for p in fold.iterdir()}
    assert not (fold / LATEST).exists()
    epochs = [json.loads(line) for line in (fold / "training_log.jsonl").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [0, 1]
    assert all(epoch["train_loss"] > -1 for epoch in epochs)
    assert {path.name for path in (fold / "validation").iterdir()} == {
        "case_00.nii.gz",
        "case_02.nii.gz",
        "case_04.nii.gz",
        "summary.json",
    }
    for name in ("progress.png", "overlay_best.png", "overlay_worst.png"):
        assert (fold / name).read_bytes().startswith(b"\x89PNG"), name
    log = (fold / "training_log.txt").read_text()
    assert "nnU-Net cannot go on from these checkpoints" in log
    assert re.search(r"^\S+T\S+ epoch 1: loss ", log, re.MULTILINE)


def test_the_report_is_one_file_with_figures_and_pictures(trained: Path) -> None:
    page = (trained / MODEL / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert page.count("src=") + page.count("href=") == 3
    assert "<td>first</td>" in page


def test_a_finished_fold_is_left_as_it_is(trained: Path) -> None:
    final = trained / MODEL / "fold_0" / FINAL
    before = final.stat().st_mtime_ns
    ran = seggate(trained, "train", str(trained / NAME), "--fold", "0", *SHORT, "--json")
    assert ran.exit_code == 0, ran.output
    assert shown(ran)["state"] == "finished"
    assert final.stat().st_mtime_ns == before


def test_a_killed_training_that_is_started_again_ends_as_one_that_was_not(tmp_path: Path, trained: Path) -> None:
    """SIGTERM first: a checkpoint and exit code 0. Then SIGKILL in the middle. Then to the end."""
    raw = planned(tmp_path)
    log = tmp_path / MODEL / "fold_0" / "training_log.txt"
    ended = _run_until(tmp_path, raw, log, "begins at epoch 0", signal.SIGTERM)
    assert ended == 0
    assert "stopped in epoch" in log.read_text()
    assert (log.parent / LATEST).exists()
    assert _run_until(tmp_path, raw, log, "goes on at epoch", signal.SIGKILL) == -signal.SIGKILL
    ran = seggate(tmp_path, "train", str(raw), "--fold", "0", *SHORT, "--json")
    assert ran.exit_code == 0, ran.output
    other = trained / MODEL / "fold_0"
    assert same_weights(read_state(log.parent / FINAL).weights, read_state(other / FINAL).weights)
    summary = "validation/summary.json"
    found, expected = (json.loads((fold / summary).read_text())["mean"] for fold in (log.parent, other))
    assert found == expected


def _run_until(root: Path, raw: Path, log: Path, line: str, number: int) -> int:
    """Trains in a process of its own, which gets the signal once the log has the line; returns its exit code."""
    words = ["train", str(raw), "--fold", "0", *SHORT, "--results", str(root / "results")]
    words += ["--preprocessed", str(root / "preprocessed"), "--processes", "1", "--no-probe"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'fhir'}:{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(
        [sys.executable, "-m", "gateway.cli", *words], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not (log.exists() and line in log.read_text()):
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(number)
            return process.wait(timeout=60)
        finally:
            process.kill()


@pytest.mark.requirement("ART-06", open="a probe on a GPU")
def test_a_steps_memory_is_measured_first_and_one_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = planned(tmp_path)
    fold = tmp_path / MODEL / "fold_0"
    ran = seggate(tmp_path, "train", str(raw), "--fold", "0", *SHORT, "--epochs", "1", "--probe")
    assert ran.exit_code == 0, ran.output
    memory = json.loads((fold / "training.json").read_text())["memory"]
    assert 0 < memory["peak_bytes"] <= memory["available_bytes"]
    assert (memory["patch_size"], memory["batch_size"]) == ([8, 8, 8], 2)
    assert re.search(
        r"a step of 2 x 8 x 8 x 8 in float32 takes [\d,]+ MiB; .* MiB are free on the processor .*; nnU-Net's estimate",
        (fold / "training_log.txt").read_text(),
    )
    monkeypatch.setattr("engine.memory_probe.available_bytes", lambda: 2**20)
    ran = seggate(tmp_path, "train", str(raw), "--fold", "1", *SHORT, "--probe", "--json")
    assert ran.exit_code == 1
    assert "plan for less with `seggate plan --gpu-memory-gb" in shown(ran)["error"]
    assert not (tmp_path / MODEL / "fold_1" / LATEST).exists()


def _processes(root: Path, raw: Path, start: list[str], *words: str) -> subprocess.Popen[str]:
    """`seggate train` of fold 0 on the processor in a process of its own; `start` is what goes before its words."""
    command = [*start, "-m", "gateway.cli", "train", str(raw), "--fold", "0", *SHORT[:4], "--precision", "float32"]
    command += ["--results", str(root / "results"), "--preprocessed", str(root / "preprocessed"), "--processes", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'fhir'}:{os.environ.get('PYTHONPATH', '')}"}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen(
        [*command, "--device", "cpu", "--no-probe", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_preprocess_train_and_validate_one_fold_together(tmp_path: Path, trained: Path) -> None:
    """`--devices 2`; the same with torchrun goes on after SIGTERM. One process trains and finds almost the same."""
    raw = planned(tmp_path)
    log = tmp_path / MODEL / "fold_0" / "training_log.txt"
    first = _processes(tmp_path, raw, [sys.executable], "--devices", "2", "--json")
    try:
        deadline = time.monotonic() + 300
        while not (log.exists() and "begins at epoch 0" in log.read_text()):
            assert first.poll() is None, first.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGTERM)
        out, errors = first.communicate(timeout=300)
    finally:
        first.kill()
    assert first.returncode == 0, errors
    assert json.loads(out)["state"] == "stopped"
    assert "cpu in float32, 2 process(es)" in log.read_text()
    assert log.read_text().count("stopped in epoch") == 1

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    second = _processes(tmp_path, raw, torchrun, "--json")
    out, errors = second.communicate(timeout=600)
    assert second.returncode == 0, errors
    (row,) = json.loads(out)["folds"]
    assert (row["state"], row["epochs"]) == ("finished", 2)
    together, alone = tmp_path / MODEL / "fold_0", trained / MODEL / "fold_0"
    mine, theirs = (read_state(fold / FINAL).weights for fold in (together, alone))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-4)
    found, expected = (json.loads((fold / "validation/summary.json").read_text()) for fold in (together, alone))
    names = [[Path(case["prediction_file"]).name for case in one["metric_per_case"]] for one in (found, expected)]
    assert names[0] == names[1]
    assert found["foreground_mean"]["Dice"] == pytest.approx(expected["foreground_mean"]["Dice"], abs=0.02)
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()}


def test_two_trainings_of_one_fold_do_not_mix_and_the_second_says_who_is_at_it(tmp_path: Path) -> None:
    raw = planned(tmp_path)
    with training_lock(tmp_path / MODEL / "fold_0"):
        ran = seggate(tmp_path, "train", str(raw), "--fold", "0", *SHORT, "--json")
        assert ran.exit_code == 1
        assert f"is being trained by process {os.getpid()} on" in shown(ran)["error"]
        status = shown(seggate(tmp_path, "train", "status", str(raw), "--json"))
        assert status["folds"][0]["state"] == "running"
        assert status["folds"][0]["process"]["pid"] == os.getpid()
        asked = seggate(tmp_path, "train", "stop", str(raw), "--json")
        assert shown(asked) == {"ok": True, "asked": [str(tmp_path / MODEL / "fold_0")]}
        assert (tmp_path / MODEL / "fold_0" / "stop").exists()
    assert not (tmp_path / MODEL / "fold_0" / "stop").exists()
    assert shown(seggate(tmp_path, "train", "stop", str(raw), "--json")) == {"ok": False, "asked": []}


def test_status_says_how_far_each_fold_is(trained: Path) -> None:
    ran = seggate(trained, "train", "status", NAME)
    assert ran.exit_code == 0
    assert "finished" in ran.stdout
    (row,) = shown(seggate(trained, "train", "status", NAME, "--json"))["folds"]
    assert (row["fold"], row["state"], row["epochs"], row["of_epochs"]) == ("0", "finished", 2, 2)
    assert seggate(trained, "train", "status", "Dataset902_None").exit_code == 1


def test_another_schedule_for_a_finished_training_is_refused_with_what_differs(tmp_path: Path) -> None:
    raw = planned(tmp_path)
    folder = tmp_path / MODEL / "fold_0"
    assert seggate(tmp_path, "train", str(raw), "--fold", "0", *SHORT, "--seed", "4").exit_code == 0
    (folder / "training.json").write_text("{}")
    ran = seggate(tmp_path, "train", str(raw), "--fold", "0", *SHORT, "--seed", "5", "--json")
    assert ran.exit_code == 1
    assert "seed: 4 then, 5 now" in shown(ran)["error"]
    assert "failed: " in (folder / "training_log.txt").read_text()


def test_a_disk_that_is_too_small_is_refused_with_numbers_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = planned(tmp_path)
    assert seggate(tmp_path, "train", str(raw), "--fold", "0", *SHORT, "--fold", "0").exit_code == 0
    monkeypatch.setattr("engine.experiment.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    ran = seggate(tmp_path, "train", str(raw), "--fold", "1", *SHORT, "--json")
    assert ran.exit_code == 1
    assert "checkpoints and validation need about" in shown(ran)["error"]
    assert not (tmp_path / MODEL / "fold_1" / LATEST).exists()


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--budget", "soon"], 2, "--budget 'soon'"),
        (["--fold", "7"], 1, "no fold '7'; there are 0 to 1"),
        (["--deterministic", "--compile", "on"], 2, "which --deterministic excludes"),
        pytest.param(
            ["--precision", "fp16"],
            1,
            "--precision fp16 needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--configuration", "4d"], 1, "no configuration '4d'; there are 2d, 3d_fullres"),
        (["--plans-name", "none"], 1, "run `seggate plan` first"),
        pytest.param(
            ["--device", "cuda"],
            1,
            "finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_trained_is_said(trained: Path, words: list[str], code: int, named: str) -> None:
    ran = seggate(trained, "train", str(trained / NAME), *words)
    assert ran.exit_code == code
    assert named in ran.stderr
    assert "Traceback" not in ran.output
