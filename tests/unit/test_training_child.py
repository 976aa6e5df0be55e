"""A command of a training as a process of its own: its answer, its end, its pause, and who waits for whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.durable import Stopped
from gateway.errors import Permanent, Transient
from gateway.learning import training_child
from gateway.learning.training_child import NICENESS, TrainingChild

Start = Callable[..., TrainingChild]


@pytest.fixture
def playing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """A child whose program is the given code instead of `seggate`; it gets the arguments that the command would."""
    monkeypatch.setattr(training_child, "_POLL_S", 0.05)
    monkeypatch.setattr(training_child, "_LOOK_S", 0.05)

    def start(
        code: str, *, stop: threading.Event | None = None, studies_wait: Callable[[], bool] = lambda: False
    ) -> TrainingChild:
        program = tmp_path / "program.py"
        program.write_text("import json, os, pathlib, signal, sys, time\n" + textwrap.dedent(code))
        return TrainingChild(
            stop=stop or threading.Event(),
            studies_wait=studies_wait,
            threads=1,
            program=(sys.executable, str(program)),
        )

    return start


def test_the_answer_is_the_document_and_the_rest_is_in_the_log(playing: Start, tmp_path: Path) -> None:
    child = playing(
        """
        print("epoch 1", file=sys.stderr)
        threads = os.environ["OMP_NUM_THREADS"]
        print(json.dumps({"ok": True, "said": sys.argv[1:], "nice": os.nice(0), "threads": threads}))
        """
    )
    document = child.run(["train", "run"], log=tmp_path / "logs" / "fold-0.log")
    assert document["said"] == ["train", "run", "--json"]
    assert document["exit_code"] == 0
    assert document["nice"] == max(NICENESS, os.nice(0))
    assert document["threads"] == "1"
    assert (tmp_path / "logs" / "fold-0.log").read_text() == "epoch 1\n"


def test_a_failure_says_the_commands_own_words(playing: Start, tmp_path: Path) -> None:
    child = playing("""print(json.dumps({"ok": False, "error": "the disk is full"})); sys.exit(1)""")
    with pytest.raises(Permanent, match="train run: the disk is full"):
        child.run(["train", "run", "x"], log=tmp_path / "fold.log")


def test_an_exit_code_that_is_fine_is_an_answer(playing: Start, tmp_path: Path) -> None:
    child = playing("""print(json.dumps({"verdict": "OUTSIDE_PLAN"})); sys.exit(3)""")
    assert child.run(["models", "test"], log=tmp_path / "test.log", fine=(0, 3))["exit_code"] == 3


def test_a_process_that_was_killed_is_named_by_its_signal(playing: Start, tmp_path: Path) -> None:
    child = playing("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(Transient, match=r"ended by SIGKILL; see fold\.log"):
        child.run(["train", "run"], log=tmp_path / "fold.log")


def test_a_stop_is_passed_on_and_waited_for(playing: Start, tmp_path: Path) -> None:
    stop, began = threading.Event(), tmp_path / "began"

    def stop_once_begun() -> bool:
        if began.exists():
            stop.set()
        return False

    child = playing(
        """
        def end(*_):
            pathlib.Path("checkpoint").touch()
            sys.exit(0)
        os.chdir(os.path.dirname(sys.argv[1]))
        signal.signal(signal.SIGTERM, end)
        pathlib.Path("began").touch()
        time.sleep(60)
        """,
        stop=stop,
        studies_wait=stop_once_begun,
    )
    with pytest.raises(Stopped):
        child.run([str(tmp_path / "x")], log=tmp_path / "fold.log", pause_file=tmp_path / "pause")
    assert (tmp_path / "checkpoint").exists()


def test_it_pauses_while_studies_wait_and_leaves_no_pause_behind(playing: Start, tmp_path: Path) -> None:
    noticed = tmp_path / "noticed"
    child = playing(
        """
        pause = pathlib.Path(sys.argv[1])
        until = time.monotonic() + 30
        while not pause.exists() and time.monotonic() < until:
            time.sleep(0.01)
        (pause.parent / "noticed").touch()
        while pause.exists() and time.monotonic() < until:
            time.sleep(0.01)
        print(json.dumps({"paused": time.monotonic() < until}))
        """,
        studies_wait=lambda: not noticed.exists(),
    )
    pause = tmp_path / "pause"
    document = child.run([str(pause)], log=tmp_path / "fold.log", pause_file=pause)
    assert document["paused"]
    assert not pause.exists()


def test_what_is_no_longer_wanted_is_stopped(playing: Start, tmp_path: Path) -> None:
    child = playing(
        """
        def end(*_):
            print(json.dumps({"state": "stopped"}))
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        pathlib.Path(sys.argv[1]).touch()
        time.sleep(60)
        """
    )
    began = tmp_path / "began"
    document = child.run(
        [str(began)], log=tmp_path / "fold.log", pause_file=tmp_path / "pause", wanted=lambda: not began.exists()
    )
    assert document["state"] == "stopped"


def test_a_command_that_was_left_behind_is_waited_for(playing: Start, tmp_path: Path) -> None:
    """What a worker that was killed had started holds the lock that it inherited."""
    log, child = tmp_path / "fold.log", playing("""print(json.dumps({"ran": True}))""")
    holder = (
        "import fcntl, subprocess, sys\n"
        "lock = open(sys.argv[1], 'ab')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], stdin=0, stdout=2,"
        " pass_fds=(lock.fileno(),))\n"
        "print('held', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(log.with_suffix(".lock"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdin is not None
        assert worker.stdout.readline() == b"held\n"
        worker.wait(30)
        answers: list[object] = []
        follower = threading.Thread(target=lambda: answers.append(child.run(["x"], log=log)))
        follower.start()
        follower.join(0.5)
        assert answers == []
        worker.stdin.close()
        follower.join(30)
    assert json.dumps(answers) == '[{"ran": true, "exit_code": 0}]'
