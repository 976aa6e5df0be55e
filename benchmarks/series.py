"""A CT series of 512x512x300 → voxels in Hounsfield units: this gateway and SimpleITK's series reader, in turns.

    python -m benchmarks.series [--json] [--rounds N] [--slices N]

The series is made of the 20 slices of the shared data's `dicom/ct-organs`, there and back again, as they are (JPEG
2000 lossless) and uncompressed. Each turn is a process of its own; files are in the page cache. The first turn warms up
and its memory is sampled; times are medians of the turns after it, from the folder's name to the voxels, without
imports. Other voxels than SimpleITK's end the benchmark.

The last line is one JSON object; `uncompressed_ratio` and `jpeg_2000_ratio` are SimpleITK's time by ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.uid import UID, ExplicitVRLittleEndian

from benchmarks.process_tree import ROOT, Usage, measure

OURS, THEIRS = "seggate", "simpleitk"
SYNTAXES = ("uncompressed", "jpeg_2000")
_ROOT = "2.25.300"


@dataclass(frozen=True, kw_only=True)
class Turn:
    usage: Usage
    reading_s: float
    voxels: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.series", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="counted turns")
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    source = Path(os.environ.get("SEGGATE_SHARED", ROOT.parent / "shared")) / "data" / "dicom" / "ct-organs" / "series"
    if not source.is_dir():
        parser.error(f"{source} is not there")
    with tempfile.TemporaryDirectory(prefix="seggate-series-") as scratch:
        for syntax in SYNTAXES:
            write_series(source, Path(scratch) / syntax, options.slices, compressed=syntax == "jpeg_2000")
        report = measured(Path(scratch), options.rounds, quiet=options.json)
    print(json.dumps(report))
    return 0


def write_series(source: Path, folder: Path, slices: int, *, compressed: bool) -> None:
    """`slices` slices at the source's distance, all of one series."""
    folder.mkdir()
    originals = [dcmread(file) for file in source.glob("*.dcm")]
    originals.sort(key=lambda image: float(image.ImagePositionPatient[2]))
    first, second = (float(image.ImagePositionPatient[2]) for image in originals[:2])
    if not compressed:
        for image in originals:
            pixels = image.pixel_array.tobytes()
            image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            image.PixelData = pixels
            image["PixelData"].VR, image["PixelData"].is_undefined_length = "OW", False
    period = 2 * len(originals) - 2
    for z in range(slices):
        place = z % period
        image = originals[place if place < len(originals) else period - place]
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = UID(f"{_ROOT}.1.{z + 1}")
        image.SeriesInstanceUID, image.InstanceNumber = f"{_ROOT}.2", z + 1
        image.ImagePositionPatient = [*image.ImagePositionPatient[:2], first + z * (second - first)]
        image.save_as(folder / f"{z:04}.dcm", enforce_file_format=True)


def measured(scratch: Path, rounds: int, *, quiet: bool) -> dict[str, Any]:
    load = [os.getloadavg()[0]]
    report: dict[str, Any] = {}
    for syntax in SYNTAXES:
        sampled = {who: _turn(who, scratch / syntax, memory=True, quiet=quiet) for who in (THEIRS, OURS)}
        turns = []
        for _ in range(rounds):
            turns.append({who: _turn(who, scratch / syntax, memory=False, quiet=quiet) for who in (THEIRS, OURS)})
        report[f"{syntax}_ratio"], report[syntax] = summarized(turns, sampled)
    load.append(os.getloadavg()[0])
    report["identical_voxels"] = True
    report["machine"] = {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "load": [round(value, 1) for value in load],
    }
    return report


def summarized(turns: list[dict[str, Turn]], sampled: Mapping[str, Turn]) -> tuple[float, dict[str, Any]]:
    """SimpleITK's median time by ours, and all figures. SystemExit where voxels differ."""
    if len({turn.voxels for pair in (*turns, sampled) for turn in pair.values()}) != 1:
        raise SystemExit("not SimpleITK's voxels")
    reading = {who: [turn[who].reading_s for turn in turns] for who in sampled}
    figures = {
        who: {
            "reading_s": [round(value, 2) for value in reading[who]],
            "process_wall_s": [round(turn[who].usage.wall_s, 2) for turn in turns],
            "process_cpu_s": [round(turn[who].usage.cpu_s, 2) for turn in turns],
            "peak_pss_mib": round(sampled[who].usage.peak_pss_mb),
            "samples_per_s": round(sampled[who].usage.samples_per_s, 1),
        }
        for who in sampled
    }
    return round(statistics.median(reading[THEIRS]) / statistics.median(reading[OURS]), 2), figures


def _turn(who: str, folder: Path, *, memory: bool, quiet: bool) -> Turn:
    log = folder.with_name(f"{who}.log")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OPJ_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "fhir")])
    command = [sys.executable, "-m", "benchmarks.series_readers", who, str(folder)]
    usage = measure(command, log=log, environment=environment, memory=memory)
    seconds, voxels = log.read_text().split()[-2:]
    if not quiet:
        sys.stderr.write(f"{folder.name}: {who}: {float(seconds):.2f} s, {usage}\n")
    return Turn(usage=usage, reading_s=float(seconds), voxels=voxels)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
