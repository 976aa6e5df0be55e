"""gateway.training_launcher: processes that are started together end together."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gateway.training_launcher import LAUNCHER, is_launched, is_orphaned, launch
from tests.support.peers import ROOT

SAYS = (
    "import os; print(*(os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE')), flush=True)"
)
WAITS = "import signal; print('waits', flush=True); signal.pause()"


def run(code: str, processes: int = 2, *, stop: threading.Event | None = None, grace_s: float = 60.0) -> int:
    return launch([sys.executable, "-c", code], processes, stop or threading.Event(), grace_s=grace_s)


def test_each_process_knows_its_place(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(SAYS, 3) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["0 0 3 3", "1 1 3 3", "2 2 3 3"]


def test_the_exit_code_is_that_of_the_first_that_failed_and_the_others_are_ended() -> None:
    code = f"import os, sys\nif os.environ['RANK'] == '1': sys.exit(7)\n{WAITS}"
    assert run(code, grace_s=0.1) == 7


def test_the_exit_code_is_theirs_where_all_failed_at_once() -> None:
    assert run("import sys; sys.exit(7)") == 7


def test_a_process_that_was_killed_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    code = f"import os\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\n{WAITS}"
    assert run(code, grace_s=0.1) == 1
    assert "process 1 of the training was ended by SIGKILL; the others end as well" in capfd.readouterr().err


def test_a_request_to_stop_reaches_every_process_once(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\n"
        "asked = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: asked.append(1))\n"
        f"open(os.path.join({str(tmp_path)!r}, os.environ['RANK']), 'w').close()\n"
        "while not asked: time.sleep(0.01)\n"
        "time.sleep(0.5)\n"
        "sys.exit(0 if len(asked) == 1 else 9)\n"
    )
    stop = threading.Event()

    def ask_when_ready() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            threading.Event().wait(0.02)
        stop.set()

    asker = threading.Thread(target=ask_when_ready)
    asker.start()
    assert run(code, stop=stop) == 0
    asker.join()


def test_a_training_whose_launcher_is_gone_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_launched()
    assert not is_orphaned()
    monkeypatch.setenv(LAUNCHER, str(os.getppid()))
    assert not is_orphaned()
    monkeypatch.setenv(LAUNCHER, str(os.getpid()))
    assert is_orphaned()


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("sys.exit()", 0), ("sys.exit(3)", 3), ("sys.exit('no')", 1)])
def test_a_process_of_several_leaves_at_once_with_its_exit_code(end: str, code: int) -> None:
    """What would abort a process in its last moments does not: an exit handler stands for torch's threads."""
    program = f"""
import atexit, os, sys
from gateway.training_launcher import leaves_at_once
atexit.register(os.abort)
with leaves_at_once():
    print("done")
    {end}
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (code, "done\n")
    assert ended.stderr == ("no\n" if "no" in end else "")


def test_starting_processes_needs_no_torch() -> None:
    code = "import sys, gateway.training_launcher, gateway.training_device; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
