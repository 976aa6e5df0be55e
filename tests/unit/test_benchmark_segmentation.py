"""What benchmarks.segmentation and benchmarks.series make of their measurements."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from benchmarks import segmentation, series
from benchmarks.process_tree import Usage
from benchmarks.segmentation_writers import write_ours, write_with_highdicom
from benchmarks.whole_body import label_map, write_series

SHAPE = (24, 64, 64)


def usage(wall_s: float, peak_mb: float = 0.0) -> Usage:
    return Usage(exit_code=0, wall_s=wall_s, cpu_s=wall_s / 2, peak_pss_mb=peak_mb, samples_per_s=50.0)


def test_ratios_are_of_medians_and_memory_is_of_the_sampled_turn() -> None:
    def turn(ours_s: float) -> dict[tuple[str, str], segmentation.Turn]:
        seconds = {segmentation.OURS: ours_s, segmentation.HIGHDICOM: 8.0, segmentation.DCMQI: 12.0}
        return {
            (who, encoding): segmentation.Turn(
                usage=usage(seconds[who], peak_mb=300.0), writing_s=seconds[who] / 4, writing_cpu_s=seconds[who] / 8
            )
            for who in seconds
            for encoding in segmentation.ENCODINGS
        }

    found = segmentation.ratios([turn(2.0), turn(9.0), turn(1.0)], turn(99.0))
    assert (found["binary_vs_highdicom"], found["binary_vs_dcmqi"]) == (4.0, 6.0)
    assert (found["binary_peak_mib"], found["labelmap_s"], found["labelmap_cpu_s"]) == (300, 0.5, 0.25)


def test_all_writers_write_the_label_map_and_other_voxels_end_the_benchmark(tmp_path: Path) -> None:
    labels = label_map(SHAPE)
    assert np.unique(labels).size > 40
    files = write_series(tmp_path / "series", SHAPE, labels)
    for encoding in segmentation.ENCODINGS:
        counts = set()
        for write in (write_ours, write_with_highdicom):
            output = tmp_path / f"{write.__name__}.dcm"
            assert min(write(encoding, files, labels, output)) > 0
            counts.add(segmentation.check(dcmread(output), labels))
        assert len(counts) == 1
        other = labels.copy()
        other[10, 30, 30] += 1
        with pytest.raises(SystemExit, match="1 voxels are not those of the label map"):
            segmentation.check(dcmread(BytesIO(output.read_bytes())), other)


def test_the_series_ratio_is_of_medians_and_needs_the_same_voxels() -> None:
    def pair(ours_s: float, voxels: str = "a") -> dict[str, series.Turn]:
        return {
            series.THEIRS: series.Turn(usage=usage(9.0), reading_s=3.0, voxels="a"),
            series.OURS: series.Turn(usage=usage(9.0), reading_s=ours_s, voxels=voxels),
        }

    assert series.summarized([pair(1.0), pair(1.5), pair(9.0)], pair(99.0))[0] == 2.0
    with pytest.raises(SystemExit, match="not SimpleITK's voxels"):
        series.summarized([pair(1.0), pair(1.5, voxels="b")], pair(1.0))
