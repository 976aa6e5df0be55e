"""`seggate train`: what it leaves behind, how it is stopped, and that it goes on."""
# ruff: noqa: E402

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.peers import ROOT, require_peer

require_peer("torch")

import torch

from engine.training_checkpoint import BEST, FINAL, LATEST, read_state
from engine.training_lock import training_lock
from tests.support.raw_datasets import write_array
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
        "predicted_by.json",
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
    with _training(root, raw, *SHORT) as process:
        _wait_for(log, line, process)
        process.send_signal(number)
        return process.wait(timeout=120)


@contextmanager
def _training(root: Path, raw: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Fold 0 in a process of its own, killed in the end."""
    command = [sys.executable, "-m", "gateway.cli", "train", str(raw), "--fold", "0", *words]
    command += ["--results", str(root / "results"), "--preprocessed", str(root / "preprocessed"), "--processes", "1"]
    command += ["--no-probe"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'fhir'}:{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _wait_for(log: Path, line: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (log.exists() and line in log.read_text()):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


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


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--seed", "5"], "seed: 0 then, 5 now"),
        (["--epochs", "50"], "epochs: 2 then, 50 now"),
        (["--iterations", "3"], "iterations: 2 then, 3 now"),
        (["--precision", "bf16"], "precision: 'float32' then, 'bf16' now"),
        (["--mirror", "none"], "mirror_axes: [0, 1, 2] then, [] now"),
    ],
)
def test_a_finished_fold_refuses_another_training_with_what_differs_and_stays_as_it_is(
    trained: Path, words: list[str], named: str
) -> None:
    folder = trained / MODEL / "fold_0"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix not in (".lock", ".txt")}
    ran = seggate(trained, "train", str(trained / NAME), "--fold", "0", *SHORT, *words, "--json")
    assert ran.exit_code == 1
    assert named in shown(ran)["error"]
    assert f"To train it again remove {folder}" in shown(ran)["error"]
    assert named in (folder / "training_log.txt").read_text()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path in before} == before


def test_a_finished_fold_takes_any_precision_where_none_is_asked_for(trained: Path) -> None:
    words = [word for word in SHORT if word not in ("--precision", "float32")]
    ran = seggate(trained, "train", str(trained / NAME), "--fold", "0", *words, "--json")
    assert ran.exit_code == 0, ran.output
    assert shown(ran)["state"] == "finished"


def test_a_finished_fold_notices_that_label_maps_were_corrected_and_that_its_splits_changed(
    tmp_path: Path, trained: Path
) -> None:
    root = _copy(trained, tmp_path)
    splits = root / "preprocessed" / NAME / "splits_final.json"
    content = json.loads(splits.read_text())
    splits.write_text(json.dumps([content[1], content[0]]))
    ran = seggate(root, "train", str(root / NAME), "--fold", "0", *SHORT, "--json")
    assert "validation cases: case_01, case_03, case_05 now, case_00, case_02, case_04 then" in shown(ran)["error"]
    splits.write_text(json.dumps(content))
    # A copy has other times; that alone is no change.
    ran = seggate(root, "train", str(root / NAME), "--fold", "0", *SHORT, "--json")
    assert ran.exit_code == 0, ran.output
    labels = np.zeros((10, 16, 18), dtype=np.uint8)
    labels[2:4, 2:4, 2:4] = 1
    write_array(root / NAME / "labelsTr" / "case_00.nii.gz", labels, (1.0, 1.0, 1.0))
    ran = seggate(root, "train", str(root / NAME), "--fold", "0", *SHORT, "--json")
    assert ran.exit_code == 1
    assert "images or label maps have changed since" in shown(ran)["error"]


@pytest.fixture(scope="module")
def other_seed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same fold with another seed."""
    root = _copy(trained, tmp_path_factory.mktemp("other"))
    shutil.rmtree(root / MODEL)
    ran = seggate(root, "train", str(root / NAME), "--fold", "0", *SHORT, "--seed", "9")
    assert ran.exit_code == 0, ran.output
    return root


@pytest.mark.parametrize("exchanged", [False, True], ids=["trained again", "another's checkpoint"])
def test_predictions_of_other_weights_are_never_a_validation(
    tmp_path: Path, trained: Path, other_seed: Path, exchanged: bool
) -> None:
    root = _copy(trained, tmp_path)
    fold, other = root / MODEL / "fold_0", other_seed / MODEL / "fold_0"
    (fold / FINAL).unlink()
    if exchanged:
        shutil.copy(other / FINAL, fold)
    request = json.loads((fold / "training.json").read_text())
    del request["result"]
    (fold / "training.json").write_text(json.dumps(request))
    ran = seggate(root, "train", str(root / NAME), "--fold", "0", *SHORT, "--seed", "9")
    assert ran.exit_code == 0, ran.output
    for name in ("validation/case_00.nii.gz", "validation_logits/case_00.npy", "validation/predicted_by.json"):
        same = (fold / name).read_bytes() == (other / name).read_bytes()
        # The record has the times of the references, which a copy of the dataset has not.
        assert same or name.endswith(".json"), name
    means = [json.loads((f / "validation/summary.json").read_text())["mean"] for f in (fold, other)]
    assert means[0] == means[1]
    log = (fold / "training_log.txt").read_text()
    assert ("predictions of other weights are removed" in log) == exchanged


def test_logits_that_were_not_kept_are_made_when_they_are_asked_for(tmp_path: Path, trained: Path) -> None:
    root = _copy(trained, tmp_path)
    logits = root / MODEL / "fold_0" / "validation_logits"
    kept = (logits / "case_00.npy").read_bytes()
    shutil.rmtree(logits)
    ran = seggate(root, "train", str(root / NAME), "--fold", "0", *SHORT, "--no-keep-logits")
    assert ran.exit_code == 0, ran.output
    assert not logits.exists()
    ran = seggate(root, "train", str(root / NAME), "--fold", "0", *SHORT)
    assert ran.exit_code == 0, ran.output
    assert (logits / "case_00.npy").read_bytes() == kept
    assert "result" in json.loads((root / MODEL / "fold_0" / "training.json").read_text())


def _copy(root: Path, target: Path) -> Path:
    """With other times."""
    for name in (NAME, "preprocessed", "results"):
        shutil.copytree(root / name, target / name, copy_function=shutil.copyfile)
    return target


def test_the_fold_all_of_the_article_says_that_its_hold_out_is_validated_too(tmp_path: Path) -> None:
    raw = planned(tmp_path, profile="article", cases=4)
    words = ["--profile", "article", "--configuration", "2d", "--epochs", "1", "--iterations", "1", "--threads", "1"]
    ran = seggate(tmp_path, "train", str(raw), "--fold", "all", *words)
    assert ran.exit_code == 0, ran.output
    log = next((tmp_path / "results").rglob("fold_all/training_log.txt")).read_text()
    assert "1 held-out case(s) are validated too" in log


def test_train_stop_ends_a_running_training_with_a_checkpoint(tmp_path: Path) -> None:
    raw = planned(tmp_path)
    fold = tmp_path / MODEL / "fold_0"
    words = ("--precision", "float32", "--threads", "1")  # 1000 epochs
    with _training(tmp_path, raw, *words) as process:
        _wait_for(fold / "training_log.txt", "begins at epoch 0", process)
        ran = seggate(tmp_path, "train", "stop", str(raw))
        assert ran.exit_code == 0, ran.output
        assert f"asked to stop: {fold}" in " ".join(ran.output.split())
        assert process.wait(timeout=120) == 0
    assert (fold / LATEST).exists()
    assert "stopped in epoch 0" in (fold / "training_log.txt").read_text()
    assert not (fold / "stop").exists()


def test_train_stop_ends_preprocessing_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = planned(tmp_path)
    done: list[int] = []

    def preprocess(
        _experiment: Any, _configurations: Any, *, progress: Callable[[int, int], None], **_options: Any
    ) -> int:
        for case in range(6):
            done.append(case)
            if case == 2:
                status = shown(seggate(tmp_path, "train", "status", str(raw), "--json"))
                assert [row["state"] for row in status["folds"]] == ["running"]
                assert seggate(tmp_path, "train", "stop", str(raw)).exit_code == 0
            progress(case + 1, 6)
        return 6

    monkeypatch.setattr("gateway.commands.train.preprocess_experiment", preprocess)
    ran = seggate(tmp_path, "train", str(raw), *SHORT, "--json")
    assert ran.exit_code == 0, ran.output
    assert shown(ran) == {"ok": True, "state": "stopped", "folds": []}
    assert done == [0, 1, 2]


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
        (["--budget", "30m", "--deterministic"], 2, "the learning rate follows the clock"),
        (["--fold", "00", "--epochs", "1", "--iterations", "1"], 1, "no fold '00'; there are 0 to 1"),
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


@pytest.mark.parametrize("seed", ["-1", str(2**63), str(2**80)])
def test_a_seed_beyond_its_bounds_is_wrong_usage(tmp_path: Path, seed: str) -> None:
    ran = seggate(tmp_path, "train", str(tmp_path / NAME), "--seed", seed)
    assert ran.exit_code == 2
    assert "Invalid value for '--seed'" in ran.output


def test_the_greatest_seed_trains(tmp_path: Path) -> None:
    raw = planned(tmp_path)
    ran = seggate(tmp_path, "train", str(raw), "--fold", "1", *SHORT, "--seed", str(2**63 - 1))
    assert ran.exit_code == 0, ran.output


def test_undeclared_labels_end_plan_and_train_with_case_and_value(tmp_path: Path) -> None:
    raw = planned(tmp_path)
    labels = np.zeros((10, 16, 18), np.uint16)
    labels[3:6, 4:7, 4:7] = 40000
    write_array(raw / "labelsTr" / "case_02.nii.gz", labels, (1.0, 1.0, 1.0))
    for words in (("plan", str(raw), "--plans-only"), ("train", str(raw), "--fold", "0", *SHORT)):
        ran = seggate(tmp_path, *words, "--json")
        assert ran.exit_code == 1
        assert "case_02: case_02.nii.gz: label 40000 in 27 voxels; declared are 0 to 2" in shown(ran)["error"]


def test_a_prediction_of_a_finished_fold_that_is_removed_is_made_again(tmp_path: Path, trained: Path) -> None:
    root = tmp_path / "moved"
    shutil.copytree(trained, root)
    fold = root / MODEL / "fold_0"
    (fold / "validation" / "case_02.nii.gz").unlink()
    before = (fold / FINAL).read_bytes()
    ran = seggate(root, "train", str(root / NAME), "--fold", "0", *SHORT, "--json")
    assert ran.exit_code == 0, ran.output
    again, once = (root / MODEL, trained / MODEL)
    file = "fold_0/validation/case_02.nii.gz"
    assert (again / file).read_bytes() == (once / file).read_bytes()
    assert (fold / FINAL).read_bytes() == before
