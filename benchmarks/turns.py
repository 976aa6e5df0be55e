"""Peers that run in turn, and a file of the runs that have ended, so that a benchmark that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.process_tree import ROOT, Usage

OURS, THEIRS = "seggate", "nnunet"
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one process cost, and what it said of itself (the last JSON line of its output; {} without one)."""

    usage: Usage
    said: Mapping[str, Any] = field(default_factory=dict)


class FinishedRuns:
    """Runs by a key of plain values, a line of JSON each; without a file they are kept in memory."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._runs: dict[str, Run] = {}
        if file is None or not file.exists():
            return
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written when the benchmark was killed
                continue
            self._runs[_text(entry["key"])] = Run(usage=Usage(**entry["usage"]), said=entry["said"])

    def get(self, key: Mapping[str, Any]) -> Run | None:
        return self._runs.get(_text(key))

    def add(self, key: Mapping[str, Any], run: Run) -> None:
        self._runs[_text(key)] = run
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps({'key': key, 'usage': asdict(run.usage), 'said': run.said})}")


def in_turns(
    case: str,
    sides: Mapping[str, Callable[[bool], Run]],
    *,
    pairs: int,
    runs: FinishedRuns,
    of: Mapping[str, str],
    tell: Tell,
) -> dict[str, list[Run]]:
    """Turn 0 warms up and has its memory sampled (the argument is then true), `pairs` turns follow, each side once.

    `of` says for each side of what the runs are; a run that has ended with the same is not made again.
    """
    found: dict[str, list[Run]] = {side: [] for side in sides}
    for turn in range(pairs + 1):
        for side, run in sides.items():
            key = {"case": case, "side": side, "turn": turn, "of": of.get(side, "")}
            done = runs.get(key)
            if done is None:
                tell(f"{case}: {side}, " + (f"turn {turn} of {pairs}" if turn else "warming up"))
                done = run(turn == 0)
                runs.add(key, done)
            usage = done.usage
            tell(
                f"{case}: {side}: {usage.wall_s:.1f} s, {usage.cpu_s:.1f} s of CPU"
                + (f", {usage.peak_pss_mb:.0f} MiB" if turn == 0 else "")
            )
            found[side].append(done)
    return found


def summarize(found: Mapping[str, Sequence[Run]], *, cpu_s: Callable[[Run], float]) -> dict[str, Any]:
    """Medians of the turns after the first, whose memory counts; ratios are nnU-Net's over ours, absent without it."""
    counted = {side: [run.usage for run in runs[1:]] or [runs[0].usage] for side, runs in found.items()}
    wall = {side: [round(usage.wall_s, 2) for usage in usages] for side, usages in counted.items()}
    cpu = {side: [round(cpu_s(run), 2) for run in (runs[1:] or runs[:1])] for side, runs in found.items()}
    sampled = {side: runs[0].usage for side, runs in found.items()}
    result: dict[str, Any] = {}
    if THEIRS in found:
        for name, values in (("wall_ratio", wall), ("cpu_ratio", cpu)):
            result[name] = round(statistics.median(values[THEIRS]) / statistics.median(values[OURS]), 2)
        result["peak_pss_ratio"] = round(sampled[THEIRS].peak_pss_mb / sampled[OURS].peak_pss_mb, 2)
    return {
        **result,
        "peak_mib": round(sampled[OURS].peak_pss_mb),
        "pairs": len(next(iter(found.values()))) - 1,
        "wall_s": wall,
        "cpu_s": round(statistics.median(cpu[OURS]), 2),
        "cpu_s_by_side": cpu,
        "peak_mib_by_side": {side: round(usage.peak_pss_mb) for side, usage in sampled.items()},
        "largest_process_rss_mib": {side: round(usage.peak_rss_mb) for side, usage in sampled.items()},
        "sample_ms": {side: round(usage.sample_ms, 1) for side, usage in sampled.items()},
        "longest_sample_ms": {side: round(usage.longest_ms, 1) for side, usage in sampled.items()},
    }


def last_json(text: str) -> dict[str, Any]:
    """The last line that is a JSON object; {} without one."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(found, dict):
                return found
    return {}


def code_digest() -> str:
    """Of the engine and of what runs it here: where they have changed, our runs are made again."""
    digest = hashlib.sha256()
    for file in sorted([*(ROOT / "engine").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without what concerns Python and nnU-Net, with our modules on the path."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "nnUNet_"))}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "fhir")]), **more}


def machine() -> dict[str, Any]:
    """What the figures were measured on; `load` is that of the last minute."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.machine()),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 1),
    }


def write_report(report: Mapping[str, Any], out: Path | None) -> None:
    """The report as the last line of the standard output, and into a file where one is named."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report), flush=True)


def teller(*, quiet: bool) -> Tell:
    """Says lines on the standard error, or nothing."""

    def tell(line: str) -> None:
        if not quiet:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    return tell


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
