"""The README's figures are those of a report that the benchmark wrote."""

from __future__ import annotations

import json

import pytest

from tests.support.peers import ROOT

REPORT = ROOT / "benchmarks" / "reports" / "predict.json"
ROWS = {row["name"]: row for row in json.loads(REPORT.read_text(encoding="utf-8"))["cases"]}


def _rows() -> dict[str, list[str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("## Beside nnU-Net")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return {row[0].strip("`"): row[2:] for row in cells}


def test_every_case_of_the_report_is_in_the_table_and_no_other() -> None:
    assert set(_rows()) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_figure_in_the_table_is_that_of_the_report(name: str) -> None:
    report = ROWS[name]
    runtime = f"{report['backend'].partition(' ')[0]}, {report['precision']}"
    share = f"{report['different_voxels']:,} of {report['voxels']:,}"
    assert _rows()[name] == [
        runtime,
        f"{report['wall_ratio']:.1f}",
        f"{report['cpu_ratio']:.1f}",
        f"{report['peak_pss_ratio']:.1f}",
        share,
    ]
