"""`seggate corrections add, list, export`: from the cases that wait to labels that a reader gave, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from typer.testing import CliRunner

from engine.nifti import read_label_map, read_nifti
from gateway.cli import app
from gateway.learning.corrections import correction_of, right_labels
from gateway.learning.registration import register
from gateway.results.inference import load_labels
from gateway.results.segmentation import encode_segmentation
from gateway.settings import load_settings
from gateway.state import prepare_state
from storage.records import Result, ResultState
from tests.support.config_folder import write_config
from tests.support.live_results import MODEL, SHAPE, SPACING_MM, LiveModel, live_model
from tests.support.phantoms import PhantomSeries, write_series
from tests.support.result_contents import content_of, part_of


@dataclass
class Site:
    """A gateway's state with two studies that were served."""

    config: Path
    live: LiveModel
    results: list[str]
    series: list[PhantomSeries]

    def run(self, *words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, [*words, "--config", str(self.config)])
        assert done.exit_code == code, done.output
        assert "Traceback" not in done.output
        return done.output if code else done.stdout + done.stderr

    def json(self, *words: str) -> Any:
        done = CliRunner().invoke(app, [*words, "--json", "--config", str(self.config)])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def right_labels(self, result_id: str) -> Any:
        with self.live.database.reading() as session:
            result, said = session.get_one(Result, result_id), correction_of(session, result_id)
        assert said is not None
        return right_labels(self.live.spool, result, said)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    config = write_config(tmp_path)
    (config / "learning.toml").write_text(
        f'[[models]]\nname = "{MODEL}"\n[models.selection]\nleast = 1\nmost = 9\nrandom_share = 0\n'
    )
    settings = load_settings(config)
    database = prepare_state(settings)
    with live_model(tmp_path, database=database, spool=settings.spool_dir) as live:
        kinds: tuple[dict[str, Any], ...] = (
            {"orientation": "double-oblique", "order": "reversed"},
            {"orientation": "axial-mirrored"},
        )
        series = [
            write_series(tmp_path / "in" / str(n), shape=SHAPE, spacing_mm=SPACING_MM, seed=n, **kind)
            for n, kind in enumerate(kinds, start=1)
        ]
        yield Site(config=config, live=live, results=[live.serve(one) for one in series], series=series)
    database.close()


@pytest.fixture
def known_model(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's bundle without a registry, which takes seconds to make."""
    monkeypatch.setattr("gateway.commands.corrections.open_registry", lambda _: site.live.registry)


@pytest.mark.requirement("ART-21", "ART-26")
def test_exported_cases_come_back_corrected(site: Site, tmp_path: Path) -> None:
    register(load_settings(site.config), site.live.bundle, candidate=False, actor="test")
    folder = tmp_path / "out"
    done = site.json("corrections", "export", str(folder))
    assert sorted(done[MODEL]["written"]) == sorted(site.results)
    assert json.loads((folder / MODEL / "labels.json").read_text()) == {"1": "left structure", "2": "right structure"}
    for result_id, series in zip(site.results, site.series, strict=True):
        image = read_nifti([folder / MODEL / "images" / f"{result_id}.nii.gz"])
        labels = read_label_map(folder / MODEL / "labels" / f"{result_id}.nii.gz")
        assert np.array_equal(image.array[0], series.array)
        assert np.array_equal(labels.array, series.labels)
        assert np.allclose(image.geometry.affine_lps, series.affine_lps, atol=1e-3)
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    assert "Confidential" not in "".join(names)
    assert all(b"Confidential" not in path.read_bytes() for path in folder.rglob("*") if path.is_file())

    # A reader draws in the file; exported again it stays as it was drawn.
    first = site.results[0]
    drawn = folder / MODEL / "labels" / f"{first}.nii.gz"
    image = sitk.ReadImage(str(drawn))
    image[2:6, 3:7, 4:6] = 1
    sitk.WriteImage(image, str(drawn))
    before = drawn.read_bytes()
    assert site.json("corrections", "export", str(folder))[MODEL]["there"] == done[MODEL]["written"]
    assert drawn.read_bytes() == before
    said = site.run("corrections", "add", first, "--nifti", str(drawn), "--by", "reader 7", "--reason", "border")
    assert f"result {first} is corrected by reader 7; its Dice against these labels is 0." in said
    expected = site.series[0].labels.copy()
    expected[4:6, 3:7, 2:6] = 1
    assert np.array_equal(site.right_labels(first), expected)
    # What has labels waits no more.
    assert site.json("learn", "cases", MODEL)["waiting"] == 1
    assert site.json("corrections", "export", str(tmp_path / "more"))[MODEL]["written"] == [site.results[1]]


@pytest.mark.requirement("ART-26")
@pytest.mark.usefixtures("known_model")
def test_each_way_to_judge_a_result_is_kept_and_listed(site: Site, tmp_path: Path) -> None:
    assert "no result was read yet" in site.run("corrections", "list")
    first, second = site.results
    assert "noted as opened" in site.run("corrections", "add", first[:12], "--opened")
    assert "approved by" in site.run("corrections", "add", site.series[0].study_instance_uid, "--approve")
    assert "rejected" in site.run("corrections", "add", second, "--reject", "--reason", "motion", "--by", "reader")
    seg, labels = tmp_path / "seg.dcm", site.series[1].labels.copy()
    part = part_of(site.series[1].files)
    seg.write_bytes(encode_segmentation(content_of(part, labels)).data)
    unchanged = site.run("corrections", "add", second, "--seg", str(seg), code=1)
    assert "the labels are its own, unchanged; approve it if they are right" in unchanged
    labels[0, 0, 0] = 1
    seg.write_bytes(encode_segmentation(content_of(part, labels)).data)
    document = site.json("corrections", "add", second, "--seg", str(seg), "--seconds", "40")
    assert (document["kind"], document["seconds"]) == ("corrected", 40)
    assert 0.99 < document["mean_dice"] < 1
    rows = site.json("corrections", "list", MODEL)
    assert [(row["result_id"], row["kind"]) for row in rows] == [(first, "approved"), (second, "corrected")]
    shown = site.run("corrections", "list")
    assert first in shown
    assert "1.000" in shown
    assert site.json("corrections", "list", "other") == []


@pytest.mark.usefixtures("known_model")
def test_what_cannot_be_kept_is_said_and_leaves_nothing(site: Site, tmp_path: Path) -> None:
    first, second = site.results
    assert "one of --seg, --nifti" in site.run("corrections", "add", first, code=2)
    assert "one of --seg, --nifti" in site.run("corrections", "add", first, "--approve", "--reject", code=2)
    assert "neither a result's id nor a study's UID" in site.run("corrections", "add", "Doe", "--approve", code=1)
    assert "no result that was released" in site.run("corrections", "add", "1.9.9", "--approve", code=1)
    common = site.series[0].study_instance_uid[:8]
    several = site.run("corrections", "add", common, "--approve", code=1)
    assert "several results" in several
    assert all(result_id in several for result_id in site.results)
    other = tmp_path / "other.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(load_of(site, second)), str(other))
    assert "another grid than its images" in site.run("corrections", "add", first, "--nifti", str(other), code=1)
    assert "--nifti takes" in site.run("corrections", "add", first, "--seg", str(other), code=1)
    with site.live.database.session() as session:
        session.get_one(Result, first).state = ResultState.SUPERSEDED
    assert "was superseded" in site.run("corrections", "add", first, "--approve", code=1)
    assert site.json("corrections", "list") == []


def load_of(site: Site, result_id: str) -> Any:
    with site.live.database.reading() as session:
        return load_labels(site.live.spool, session.get_one(Result, result_id))


def test_an_export_says_what_it_leaves_out(site: Site, tmp_path: Path) -> None:
    site.live.serve(tilt_deg=20.0)
    said = site.run("corrections", "export", str(tmp_path / "out"), code=1)
    assert f"{MODEL}: 2 cases written" in said
    assert "tilted gantry" in said
    assert "no study of this model" in site.run(
        "corrections", "export", str(tmp_path / "x"), "--model", "nobody", code=1
    )
