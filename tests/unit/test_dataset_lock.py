"""engine.dataset_lock: one changes a dataset, or any number read it; the lock ends with its process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from engine.dataset_lock import LOCK, changing_dataset, reading_dataset
from engine.errors import DatasetBusy

Holds = Callable[[Path], AbstractContextManager[None]]


@pytest.mark.parametrize("second", [changing_dataset, reading_dataset])
def test_what_is_being_changed_is_neither_changed_nor_read_by_another(tmp_path: Path, second: Holds) -> None:
    with changing_dataset(tmp_path / "D"):
        message = rf"^D: is being changed by process {os.getpid()} on .*start again"
        with pytest.raises(DatasetBusy, match=message), second(tmp_path / "D"):
            pass
        assert (tmp_path / "D" / LOCK).exists()
    assert not (tmp_path / "D").exists()
    with second(tmp_path / "D"):
        pass


def test_any_number_read_and_meanwhile_nobody_changes(tmp_path: Path) -> None:
    with reading_dataset(tmp_path):
        with reading_dataset(tmp_path):
            pass
        with pytest.raises(DatasetBusy, match="is in use; wait"), changing_dataset(tmp_path):
            pass
    with changing_dataset(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_locks_nothing(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from engine.dataset_lock import changing_dataset\n"
        "with changing_dataset(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for hold in (reading_dataset, changing_dataset):
        ran = subprocess.run([sys.executable, "-c", script, str(tmp_path / "D")], capture_output=True, timeout=60)
        assert ran.returncode == -9, ran.stderr
        assert (tmp_path / "D" / LOCK).exists()
        with hold(tmp_path / "D"):
            pass
        assert not (tmp_path / "D" / LOCK).exists()


def test_another_process_is_kept_out(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from engine.dataset_lock import changing_dataset\n"
        "with changing_dataset(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(DatasetBusy, match=f"by process {other.pid} on"), reading_dataset(tmp_path):
            pass
        other.communicate(timeout=60)
    with changing_dataset(tmp_path):
        pass


def test_a_folder_that_is_left_with_something_in_it_stays(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "D"
    with changing_dataset(folder):
        (folder.parent / "kept").touch()
    assert [path.name for path in folder.parent.iterdir()] == ["kept"]


def test_what_cannot_be_written_to_is_read_without_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.dataset_lock.os.access", lambda *_: False)
    with reading_dataset(tmp_path):
        assert not list(tmp_path.iterdir())
    with reading_dataset(tmp_path / "gone"):
        pass
