"""engine.whole_file: the whole file or the old one, also for several writers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.whole_file import whole_file


@pytest.mark.parametrize("keeps_ending", [False, True])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, keeps_ending: bool) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_text("old")
    names: list[str] = []

    def write() -> None:
        with whole_file(path, keeps_ending=keeps_ending) as partial:
            partial.write_text("half")
            names.append(partial.name)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert [name.endswith(".nii.gz") for name in names] == [keeps_ending]
    assert [file.name for file in tmp_path.iterdir()] == ["a.nii.gz"]
    assert path.read_text() == "old"


def test_writers_at_one_time_do_not_meet(tmp_path: Path) -> None:
    path, both = tmp_path / "report.html", threading.Barrier(2, timeout=30)

    def write(text: str) -> str:
        with whole_file(path) as partial:
            partial.write_text(text)
            both.wait()
        return text

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, ("one", "two"))) == ["one", "two"]
    assert path.read_text() in ("one", "two")
    assert len(list(tmp_path.iterdir())) == 1
