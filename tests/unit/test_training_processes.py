"""engine.training_processes: several processes train what one would, end together, and never wait for a dead one."""
# ruff: noqa: E402

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.peers import ROOT, require_peer

require_peer("torch")

import torch

from engine.errors import TrainingRefused
from engine.training import Trainer
from engine.training_checkpoint import FINAL, LATEST, read_state
from engine.training_processes import Place, TrainingProcesses, place_of
from gateway.training_launcher import launch
from tests.support.tiny_processes import FAILED, MODELS, setup_of
from tests.support.tiny_training import same_weights


def run(capfd: pytest.CaptureFixture[str], *words: str, processes: int = 2, grace_s: float = 60.0) -> tuple[int, str]:
    """The exit code, and all that the processes printed."""
    command = [sys.executable, "-m", "tests.support.tiny_processes", *words]
    code = launch(command, processes, threading.Event(), grace_s=grace_s)
    return code, "".join(capfd.readouterr())


def alone(folder: Path, name: str) -> Trainer:
    """The same training by one process, without an interruption."""
    trainer = Trainer(setup_of(folder, name, deterministic=False), folder / "alone")
    assert trainer.run()
    return trainer


def assert_alike(folder: Path, other: Trainer) -> None:
    """Sums in another order differ in their last digits, and a training makes more of it."""
    state = read_state(folder / "fold_0" / FINAL)
    assert not any("module." in name for name in state.weights)
    for name, expected in other.network.state_dict().items():
        torch.testing.assert_close(state.weights[name], expected, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(state.own["records"], other.records, strict=True):
        assert mine["train_loss"] == pytest.approx(theirs.train_loss, abs=1e-5)
        assert mine["validation_loss"] == pytest.approx(theirs.validation_loss, abs=1e-5)
        assert mine["dice_per_class"] == pytest.approx(theirs.dice_per_class, abs=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_the_weights_of_one(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """A batch of three in a share of one and one of two."""
    expected = alone(tmp_path, name)
    code, said = run(capfd, "train", str(tmp_path), name)
    assert code == 0, said
    assert_alike(tmp_path, expected)


def test_all_stop_when_one_is_told_to_and_any_number_of_them_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = alone(tmp_path, "labels")
    code, said = run(capfd, "train", str(tmp_path), "labels:stop")
    assert code == 0, said
    assert "0 at 0 2" in said
    assert "1 at 0 2" in said
    assert (tmp_path / "fold_0" / LATEST).exists()
    # One process, after two; three of them would go on as well.
    code, said = run(capfd, "train", str(tmp_path), "labels", processes=1)
    assert code == 0, said
    assert_alike(tmp_path, expected)


def test_deterministic_training_goes_on_with_as_many_processes_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    setup = setup_of(tmp_path, "labels", deterministic=True)
    asked = iter((False, False, True))
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert not Trainer(setup, tmp_path / "fold_0").run(stop=lambda: next(asked))
    finally:
        torch.set_num_threads(torch_threads)
    code, said = run(capfd, "train", str(tmp_path), "labels:deterministic")
    assert code == FAILED
    assert "trained with 1 process(s); deterministic mode needs as many again, not 2" in said


@pytest.mark.parametrize(("signal_name", "hangs"), [("SIGKILL", False), ("SIGSTOP", True)])
def test_a_process_that_dies_or_hangs_ends_the_others_with_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], signal_name: str, hangs: bool
) -> None:
    setup_of(tmp_path, "labels")
    # The one that died is noticed by the other at once; the one that hangs by its timeout, and then killed.
    code, said = run(capfd, "train", str(tmp_path), f"labels:{signal_name}", grace_s=1.0 if hangs else 60.0)
    assert code == (FAILED if hangs else 1), said
    assert "WorkerDied: another process of this training has ended, or does not answer" in said
    assert "0 at" not in said


def test_what_processes_say_to_each_other_arrives(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, said = run(capfd, "talk", str(tmp_path), "-", processes=3)
    assert (code, said.count("talked")) == (0, 3)


def test_torchrun_starts_them_as_well(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*torchrun, "-m", "tests.support.tiny_processes", "talk", str(tmp_path), "-"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("talked") == 2


@pytest.mark.parametrize(("batch_size", "size"), [(2, 2), (9, 2), (12, 5), (3, 3)])
def test_shares_are_even_and_every_sample_is_in_one(batch_size: int, size: int) -> None:
    processes = [TrainingProcesses() for _ in range(size)]
    for rank, one in enumerate(processes):
        one.place = Place(rank=rank, size=size)
    shares = [one.share(batch_size) for one in processes]
    assert [sample for share in shares for sample in share] == list(range(batch_size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_batch_smaller_than_the_processes_is_refused() -> None:
    many = TrainingProcesses()
    many.place = Place(rank=0, size=4)
    with pytest.raises(TrainingRefused, match="a batch of 2 cannot be shared by 4 processes; use at most 2"):
        many.share(2)


def test_the_place_is_what_torchrun_says() -> None:
    assert place_of({}) == Place()
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert place_of(environment) == Place(rank=5, size=8, local_rank=1, local_size=4)


def test_a_process_alone_waits_for_nobody() -> None:
    one = TrainingProcesses()
    assert one.gather("x") == ["x"]
    assert one.on_first(lambda: 3) == 3
    assert one.first_number(0.5) == 0.5
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    assert one.join_gradients([weight], torch.tensor(2.0)) == 2.0
    assert same_weights({"grad": weight.grad}, {"grad": torch.ones(2)})
