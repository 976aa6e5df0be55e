"""Writing a Segmentation of 104 structures on 300x512x512: this gateway, highdicom as documented, and dcmqi, in turns.

    python -m benchmarks.segmentation [--json] [--rounds N] [--slices N]

Each turn is a process of its own that reads the series' headers and the label map and writes one file: BINARY
uncompressed, and LABELMAP (here in RLE, by highdicom in RLE, by dcmqi uncompressed). The first turn warms up and its
memory is sampled; times are medians of the turns after it. What all wrote is read back with pydicom and compared
with the label map voxel by voxel; another result ends the benchmark.

The last line is one JSON object. `binary_vs_highdicom` and `binary_vs_dcmqi` are the peer's wall time by ours, of whole
processes (`writing_vs_highdicom`: without imports and reading); `binary_peak_mib` is the largest sum of proportional
set sizes of ours; `labelmap_s` is from label map and headers in memory to the closed file,
`labelmap_cpu_s` its CPU time, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels.utils import iter_pixels

from benchmarks.process_tree import ROOT, Usage, measure
from benchmarks.segmentation_writers import CATEGORY
from benchmarks.whole_body import SPACING_MM, STRUCTURES, label_map, write_series

OURS, HIGHDICOM, DCMQI = "seggate", "highdicom", "dcmqi"
ENCODINGS = ("BINARY", "LABELMAP")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """writing_s, writing_cpu_s: what the program itself says it took from the label map in memory to the file; None for
    dcmqi."""

    usage: Usage
    writing_s: float | None
    writing_cpu_s: float | None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.segmentation", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="counted turns")
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    if shutil.which("itkimage2segimage") is None:
        parser.error("dcmqi's itkimage2segimage is not on the PATH (pip install dcmqi)")
    with tempfile.TemporaryDirectory(prefix="seggate-segmentation-") as scratch:
        report = Benchmark(Path(scratch), options.slices, quiet=options.json).report(options.rounds)
    print(json.dumps(report))
    return 0


class Benchmark:
    def __init__(self, scratch: Path, slices: int, *, quiet: bool) -> None:
        self._scratch = scratch
        self._quiet = quiet
        self._labels = label_map((slices, 512, 512))
        write_series(scratch / "series", self._labels.shape, self._labels)
        np.save(scratch / "labels.npy", self._labels)
        image = sitk.GetImageFromArray(self._labels)
        image.SetSpacing(SPACING_MM[::-1])
        image.SetOrigin((-200.0, -200.0, 0.0))
        sitk.WriteImage(image, str(scratch / "labels.nrrd"))
        (scratch / "dcmqi.json").write_text(json.dumps(_dcmqi_metadata()))

    def report(self, rounds: int) -> dict[str, Any]:
        load = [os.getloadavg()[0]]
        methods = [(who, encoding) for encoding in ENCODINGS for who in (OURS, HIGHDICOM, DCMQI)]
        sampled = {}
        frames = {}
        for who, encoding in methods:
            sampled[who, encoding] = self._turn(who, encoding, memory=True)
            frames[who, encoding] = check(dcmread(self._output(who, encoding)), self._labels)
        turns: list[dict[tuple[str, str], Turn]] = []
        for _ in range(rounds):
            turns.append({method: self._turn(*method, memory=False) for method in methods})
        load.append(os.getloadavg()[0])
        return {
            **ratios(turns, sampled),
            "frames": {f"{who} {encoding}": count for (who, encoding), count in frames.items()},
            "equal_voxel_for_voxel": True,
            "file_mib": {
                f"{who} {encoding}": round(self._output(who, encoding).stat().st_size / 2**20, 1)
                for who, encoding in methods
            },
            "structures": int(np.unique(self._labels).size) - 1,
            "shape": list(self._labels.shape),
            "machine": {
                "cpu": _cpu_name(),
                "cpus": os.cpu_count(),
                "python": platform.python_version(),
                "system": platform.platform(),
                "load": [round(value, 1) for value in load],
            },
        }

    def _output(self, who: str, encoding: str) -> Path:
        return self._scratch / f"{who}-{encoding}.dcm"

    def _turn(self, who: str, encoding: str, *, memory: bool) -> Turn:
        output, log = self._output(who, encoding), self._scratch / f"{who}.log"
        output.unlink(missing_ok=True)
        if who == DCMQI:
            command = [
                "itkimage2segimage",
                *("--inputImageList", str(self._scratch / "labels.nrrd")),
                *("--inputDICOMDirectory", str(self._scratch / "series")),
                *("--inputMetadata", str(self._scratch / "dcmqi.json")),
                *("--outputDICOM", str(output), "--skip", "1", "--segmentationType", encoding.lower()),
            ]
        else:
            inputs = [str(self._scratch / "series"), str(self._scratch / "labels.npy")]
            command = [sys.executable, "-m", "benchmarks.segmentation_writers", who, encoding, *inputs, str(output)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "fhir")])
        usage = measure(command, log=log, environment=environment, memory=memory)
        writing_s, writing_cpu_s = (
            (None, None) if who == DCMQI else (float(word) for word in log.read_text().split()[-2:])
        )
        if not self._quiet:
            sys.stderr.write(f"{who} {encoding}: {usage}, writing {writing_s} s\n")
        return Turn(usage=usage, writing_s=writing_s, writing_cpu_s=writing_cpu_s)


def ratios(turns: list[dict[tuple[str, str], Turn]], sampled: Mapping[tuple[str, str], Turn]) -> dict[str, Any]:
    """All figures, and ratios of their medians; memory from the turn that was sampled."""

    def wall(who: str, encoding: str) -> list[float]:
        return [turn[who, encoding].usage.wall_s for turn in turns]

    def writing(who: str, encoding: str) -> list[float]:
        return [value for turn in turns if (value := turn[who, encoding].writing_s) is not None]

    def ratio(theirs: list[float], ours: list[float]) -> float:
        return round(statistics.median(theirs) / statistics.median(ours), 2)

    ours = wall(OURS, "BINARY")
    return {
        "binary_vs_highdicom": ratio(wall(HIGHDICOM, "BINARY"), ours),
        "binary_vs_dcmqi": ratio(wall(DCMQI, "BINARY"), ours),
        "binary_peak_mib": round(sampled[OURS, "BINARY"].usage.peak_pss_mb),
        "labelmap_s": round(statistics.median(writing(OURS, "LABELMAP")), 2),
        "labelmap_cpu_s": round(
            statistics.median(t for turn in turns if (t := turn[OURS, "LABELMAP"].writing_cpu_s) is not None), 2
        ),
        "writing_vs_highdicom": ratio(writing(HIGHDICOM, "BINARY"), writing(OURS, "BINARY")),
        "cpu_vs_highdicom": ratio(
            [turn[HIGHDICOM, "BINARY"].usage.cpu_s for turn in turns],
            [turn[OURS, "BINARY"].usage.cpu_s for turn in turns],
        ),
        "cpu_vs_dcmqi": ratio(
            [turn[DCMQI, "BINARY"].usage.cpu_s for turn in turns], [turn[OURS, "BINARY"].usage.cpu_s for turn in turns]
        ),
        "methods": {
            f"{who} {encoding}": {
                "wall_s": [round(value, 2) for value in wall(who, encoding)],
                "cpu_s": [round(turn[who, encoding].usage.cpu_s, 2) for turn in turns],
                "writing_s": [round(value, 2) for value in writing(who, encoding)],
                "peak_pss_mib": round(turn_sampled.usage.peak_pss_mb),
                "samples_per_s": round(turn_sampled.usage.samples_per_s, 1),
            }
            for (who, encoding), turn_sampled in sampled.items()
        },
    }


def check(dataset: Dataset, labels: NDArray[np.uint8]) -> int:
    """Number of frames; SystemExit where their voxels are not the label map's."""
    rows = dataset.Rows * dataset.Columns
    binary = dataset.SegmentationType == "BINARY"
    bits = np.frombuffer(dataset.PixelData, dtype=np.uint8) if binary else None
    found = np.zeros_like(labels)
    pixels = None if binary else iter_pixels(dataset)
    for index, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        z = round(float(frame.PlanePositionSequence[0].ImagePositionPatient[2]) / SPACING_MM[0])
        if bits is not None:
            packed = bits[index * rows // 8 : (index + 1) * rows // 8]
            mask = np.unpackbits(packed, bitorder="little").view(np.bool_).reshape(labels.shape[1:])
            segment = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            if found[z][mask].any():
                raise SystemExit("frames overlap")
            found[z][mask] = segment
        elif pixels is not None:
            found[z] = next(pixels)
    if not np.array_equal(found, labels):
        raise SystemExit(f"{np.count_nonzero(found != labels)} voxels are not those of the label map")
    return len(dataset.PerFrameFunctionalGroupsSequence)


def _dcmqi_metadata() -> dict[str, Any]:
    code = dict(zip(("CodeValue", "CodingSchemeDesignator", "CodeMeaning"), CATEGORY, strict=True))
    return {
        "ContentCreatorName": "Reader1",
        "SeriesDescription": "Segmentation",
        "SeriesNumber": "300",
        "InstanceNumber": "1",
        "ContentLabel": "SEGMENTATION",
        "ContentDescription": "Image segmentation",
        "BodyPartExamined": "",
        "segmentAttributes": [
            [
                {
                    "labelID": value,
                    "SegmentDescription": f"structure {value}",
                    "SegmentLabel": f"structure {value}",
                    "SegmentAlgorithmType": "AUTOMATIC",
                    "SegmentAlgorithmName": "whole-body",
                    "SegmentedPropertyCategoryCodeSequence": code,
                    "SegmentedPropertyTypeCodeSequence": code,
                    "recommendedDisplayRGBValue": [value, 255 - value, 128],
                }
                for value in range(1, STRUCTURES + 1)
            ]
        ],
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
