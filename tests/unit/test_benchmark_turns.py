"""benchmarks.turns: the order of the turns, what a file of finished runs spares, and the figures of the last line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.process_tree import Usage
from benchmarks.turns import (
    OURS,
    THEIRS,
    FinishedRuns,
    Run,
    clean_environment,
    in_turns,
    last_json,
    summarize,
    write_report,
)


def usage(wall_s: float, cpu_s: float, peak_mb: float = 0.0) -> Usage:
    return Usage(exit_code=0, wall_s=wall_s, cpu_s=cpu_s, peak_pss_mb=peak_mb, sample_ms=12.0, longest_ms=40.0)


class Sides:
    """Two sides that note who ran, and whether memory was sampled."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, bool]] = []
        self.sides: dict[str, Callable[[bool], Run]] = {
            name: lambda memory, name=name: self._run(name, memory)  # type: ignore[misc]
            for name in (THEIRS, OURS)
        }

    def _run(self, name: str, memory: bool) -> Run:
        self.ran.append((name, memory))
        return Run(usage=usage(1.0, 1.0, 100.0 if memory else 0.0), said={"number": len(self.ran)})


def turns(sides: Sides, runs: FinishedRuns, *, pairs: int = 2, engine: str = "one") -> dict[str, list[Run]]:
    return in_turns("case", sides.sides, pairs=pairs, runs=runs, of={OURS: engine}, tell=lambda _line: None)


def test_sides_run_in_turn_and_the_warm_up_alone_is_sampled() -> None:
    sides = Sides()
    found = turns(sides, FinishedRuns())
    assert [name for name, _ in sides.ran] == [THEIRS, OURS] * 3
    assert [memory for _, memory in sides.ran] == [True, True, False, False, False, False]
    assert [run.said["number"] for run in found[OURS]] == [2, 4, 6]


def test_a_stopped_benchmark_goes_on_after_its_last_whole_run(tmp_path: Path) -> None:
    file = tmp_path / "work" / "runs.jsonl"
    before = turns(Sides(), FinishedRuns(file), pairs=1)
    whole = file.read_text()
    file.write_text(whole[: len(whole) - 20])  # killed while the last line was written
    again = Sides()
    after = turns(again, FinishedRuns(file), pairs=1)
    assert again.ran == [(OURS, False)]
    assert after[THEIRS] == before[THEIRS]
    last = Sides()
    turns(last, FinishedRuns(file), pairs=1)
    assert last.ran == []


def test_another_engine_runs_again_and_the_peer_does_not(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    turns(Sides(), FinishedRuns(file), pairs=1)
    again = Sides()
    turns(again, FinishedRuns(file), pairs=1, engine="two")
    assert again.ran == [(OURS, True), (OURS, False)]


def test_ratios_are_of_medians_after_the_warm_up_and_memory_is_of_it() -> None:
    found = {
        THEIRS: [Run(usage=usage(500, 500, 1500)), *(Run(usage=usage(wall, 40)) for wall in (30, 90, 60))],
        OURS: [Run(usage=usage(1, 1, 500)), *(Run(usage=usage(wall, 10)) for wall in (10, 5, 99))],
    }
    row = summarize(found, cpu_s=lambda run: run.usage.cpu_s)
    assert (row["wall_ratio"], row["cpu_ratio"], row["peak_pss_ratio"]) == (6.0, 4.0, 3.0)
    assert (row["peak_mib"], row["cpu_s"], row["pairs"]) == (500, 10, 3)
    assert row["wall_s"] == {THEIRS: [30, 90, 60], OURS: [10, 5, 99]}
    assert row["sample_ms"] == {THEIRS: 12.0, OURS: 12.0}


def test_a_case_without_peer_that_ran_once_has_figures_and_no_ratios() -> None:
    row = summarize({OURS: [Run(usage=usage(7, 6, 500))]}, cpu_s=lambda run: run.usage.cpu_s)
    assert (row["wall_s"], row["cpu_s"], row["peak_mib"], row["pairs"]) == ({OURS: [7]}, 6, 500, 0)
    assert not {"wall_ratio", "cpu_ratio", "peak_pss_ratio"} & set(row)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}\n{"b": 2}\n', {"b": 2}),
        ('bar 50%\n{"a": 1}\nthe end\n{not json\n', {"a": 1}),
        ("[1]\n", {}),
        ("", {}),
    ],
)
def test_what_a_command_says_of_itself_is_its_last_json_line(text: str, found: dict[str, int]) -> None:
    assert last_json(text) == found


def test_the_report_is_the_last_line_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = {"cases": [{"name": "one"}]}
    write_report(report, tmp_path / "new" / "report.json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == report


def test_commands_do_not_inherit_what_concerns_python_and_nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_results", "elsewhere")
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    found = clean_environment(nnUNet_raw="raw")
    assert "nnUNet_results" not in found
    assert "PYTHONHASHSEED" not in found
    assert found["nnUNet_raw"] == "raw"
