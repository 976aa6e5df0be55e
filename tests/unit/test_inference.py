"""The step `infer` does its work once, and counts only what it begins."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from sqlalchemy import select

import gateway
from engine.bundle import load_bundle
from engine.errors import MemoryExceeded
from engine.predictor import Prediction, Predictor
from engine.volume import Volume
from gateway.device_share import DeviceShare
from gateway.learning.pauses import pause
from gateway.model_shelf import ModelShelf
from gateway.results import inference as step
from gateway.results.inference import Inference
from gateway.results.series import read_series
from storage.alarms import open_alarms
from storage.database import Database
from storage.errors import ObjectChanged, SpoolFull
from storage.models import ModelRegistry, RegisteredModel
from storage.records import LedgerEvent, Result, ResultState, Study, StudyFacts, StudyState
from storage.spool import Spool
from tests.support.phantoms import write_series
from tests.support.story_rows import STUDY_UID, add_result, add_study, add_version

MODEL = Path(gateway.__file__).parent / "demo" / "model"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield database
    database.close()


class _Unused:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is not needed for this")


class _Registry:
    """The demo model, whatever is asked for."""

    def get(self, name: str, semver: str) -> RegisteredModel:
        bundle = load_bundle(MODEL, verify=False)
        return RegisteredModel(
            name=name,
            semver=semver,
            registry_version=1,
            folder=MODEL,
            weights_digest=bundle.weights_digest,
            configuration_digest=bundle.configuration_digest,
            licence="",
            description="",
            aliases=("champion",),
            registered_at_ms=0,
        )


def prepared(folder: Path) -> Spool:
    spool = Spool(folder, reserve_bytes=0)
    spool.prepare()
    return spool


def inference(
    database: Database,
    spool: Path,
    attempts: int = 3,
    *,
    shelf: ModelShelf | None = None,
    memory_budget_bytes: int | None = None,
) -> Inference:
    return Inference(
        database=database,
        spool=prepared(spool),
        shelf=shelf or cast(ModelShelf, _Unused()),
        attempts=attempts,
        share=DeviceShare(budget_bytes=memory_budget_bytes),
        busy=lambda _work: None,
        idle=lambda _work: None,
    )


def kinds(database: Database) -> list[str]:
    with database.reading() as session:
        return [e.kind for e in session.scalars(select(LedgerEvent))]


@pytest.mark.requirement("QUE-27")
def test_a_repeated_inference_of_what_was_overtaken_records_it_once(database: Database, tmp_path: Path) -> None:
    with database.session() as session:
        add_study(session, StudyState.WHOLE, version=2)
        add_version(session, 1)
        add_version(session, 2, routed=False)
        add_result(session, ResultState.PENDING)
    step = inference(database, tmp_path / "spool")
    assert [step.infer("r1") for _ in range(2)] == ["superseded"] * 2
    assert kinds(database) == ["superseded"]
    with database.reading() as session:
        assert session.get_one(Result, "r1").attempts == 0


def test_what_was_queued_before_its_model_was_paused_waits_too(database: Database, tmp_path: Path) -> None:
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        add_result(session, ResultState.PENDING)
        pause(session, "tiny", by="policy", reason="critical drift in manufacturer")
    step = inference(database, tmp_path / "spool")
    assert [step.infer("r1") for _ in range(2)] == ["held"] * 2
    assert kinds(database) == ["model-paused", "waits-for-model"]
    with database.reading() as session:
        result, study = session.get_one(Result, "r1"), session.get_one(Study, STUDY_UID)
        assert (result.attempts, result.finished_at) == (0, None)
        assert (study.state, study.state_reason) == ("held", "model paused: critical drift in manufacturer")


def test_an_inference_that_was_done_is_not_done_again(database: Database, tmp_path: Path) -> None:
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        add_result(session, ResultState.PENDING, runtime={"seconds": {}})
    assert inference(database, tmp_path / "spool").infer("r1") == "inferred"
    with database.reading() as session:
        assert session.get_one(Result, "r1").attempts == 0


def ordered(database: Database, monkeypatch: pytest.MonkeyPatch, files: tuple[Path, ...]) -> None:
    """One result of the demo model, ordered for the series in `files`."""
    with database.session() as session:
        add_study(session, StudyState.PROCESSING).study_key = "0123456789abcdef0123456789abcdef"
        add_version(session)
        add_result(session, ResultState.PENDING).weights_digest = load_bundle(MODEL, verify=False).weights_digest
    monkeypatch.setattr(step, "series_files", lambda *_: files)


@pytest.mark.requirement("INF-34", open="a smaller batch of windows, a CPU in place of a GPU")
def test_a_series_that_does_not_fit_is_refused_with_the_numbers_before_a_pixel_is_decoded(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = write_series(tmp_path / "series", modality="MR", spacing_mm=(1.0, 1.0, 1.0), shape=(64, 128, 128))
    ordered(database, monkeypatch, tuple(series.files))
    decoded = []
    monkeypatch.setattr(step, "decode", lambda part: decoded.append(part))
    shelf = ModelShelf(cast(ModelRegistry, _Registry()), device="cpu")
    work = inference(database, tmp_path / "spool", shelf=shelf, memory_budget_bytes=10 * 2**20)
    with pytest.raises(
        MemoryExceeded, match=r"needs about \d+ MiB and 10 MiB may be used \(networks \d+ MiB, image 4 MiB"
    ):
        work.infer("r1")
    assert decoded == []


def test_statistics_name_the_centre_of_a_segment_in_the_patient_and_the_missing_slices(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = write_series(tmp_path / "series", modality="MR", spacing_mm=(1.0, 1.0, 1.0), shape=(24, 40, 40))
    without_two = tuple(f for z, f in enumerate(series.files) if z not in (5, 6))
    ordered(database, monkeypatch, without_two)
    shelf = ModelShelf(cast(ModelRegistry, _Registry()), device="cpu")
    predicted = shelf.predict

    def marked(model: RegisteredModel, volume: Volume, **options: Any) -> Prediction:
        prediction = predicted(model, volume, **options)
        segments = tuple(replace(s, voxels=int(s.name == "Anterior")) for s in prediction.segments)
        prediction.labels.array[...] = 0
        prediction.labels.array[3, 4, 5:8] = 1
        return replace(prediction, segments=segments)

    monkeypatch.setattr(shelf, "predict", marked)
    assert inference(database, tmp_path / "spool", shelf=shelf).infer("r1") == "inferred"
    (part,) = read_series(without_two)
    centre = part.geometry.affine_lps @ np.array([6.0, 4.0, 3.0, 1.0])
    with database.reading() as session:
        result = session.get_one(Result, "r1")
    assert result.runtime is not None
    assert (result.runtime["missing_slices"], result.runtime["series_number"]) == (2, 1)
    assert result.measurements is not None
    anterior, posterior = result.measurements
    assert anterior["centroid_lps_mm"] == pytest.approx(centre[:3], abs=1e-3)
    assert posterior["centroid_lps_mm"] is None
    # What the study was like is kept in the same transaction.
    with database.reading() as session:
        facts = session.get_one(StudyFacts, "r1")
    assert (facts.model_name, facts.model_version) == (result.model_name, result.model_version)
    assert facts.acquisition["categories"]["modality"] == "MR"
    assert facts.acquisition["numbers"]["slices"] == 22
    assert facts.image is not None
    (channel,) = facts.image["channels"]
    assert sum(channel["whole"]) == 10_000
    assert facts.image["volumes_ml"][0] == pytest.approx(anterior["volume_ml"], rel=1e-5)


class _Closable(Predictor):
    """Waits in its prediction until it may go on, and tells whether it was closed meanwhile."""

    began, goes_on, closed = threading.Event(), threading.Event(), False

    def predict(self, *_: Any, **__: Any) -> Any:
        self.began.set()
        assert self.goes_on.wait(30)
        return self.closed

    def close(self) -> None:
        self.closed = True
        super().close()


def test_a_version_that_is_needed_no_more_is_closed_never_in_use_and_loaded_again_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.model_plans.Predictor", _Closable)
    shelf = ModelShelf(cast(ModelRegistry, _Registry()), device="cpu")
    model = cast(ModelRegistry, _Registry()).get("tiny", "1.0.0")
    first = shelf.predictor(model)
    assert shelf.loaded() == {model.name: {model.semver}}
    assert shelf.close_all_but(model.name, {model.semver}) == []
    assert shelf.close_all_but("another", ()) == []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(shelf.predict, model, cast(Volume, None), budget_bytes=None)
        assert _Closable.began.wait(30)
        assert shelf.close_all_but(model.name, ()) == []
        _Closable.goes_on.set()
        assert cast(object, running.result()) is False
    assert shelf.close_all_but(model.name, ()) == [model.semver]
    assert shelf.loaded() == {}
    assert cast(_Closable, first).closed
    # What asks for it again gets another one, which is open.
    assert cast(Any, shelf.predict(model, cast(Volume, None), budget_bytes=None)) is False
    assert shelf.predictor(model) is not first
    shelf.close()


@pytest.mark.requirement("QUE-27")
@pytest.mark.parametrize("before_the_model_runs", [True, False])
def test_without_room_on_the_disk_a_result_waits_with_an_alarm_and_goes_on_when_there_is_some(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before_the_model_runs: bool
) -> None:
    series = write_series(tmp_path / "series", modality="MR", spacing_mm=(1.0, 1.0, 1.0), shape=(24, 40, 40))
    ordered(database, monkeypatch, tuple(series.files))
    shelf = ModelShelf(cast(ModelRegistry, _Registry()), device="cpu")
    runs = 0
    predicted = shelf.predict

    def counted(*arguments: Any, **named: Any) -> Prediction:
        nonlocal runs
        runs += 1
        return predicted(*arguments, **named)

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shelf, "predict", counted)
    work = inference(database, tmp_path / "spool", attempts=2, shelf=shelf)
    with monkeypatch.context() as patch:
        if before_the_model_runs:
            patch.setattr(Spool, "free_bytes", lambda _: 24 * 40 * 40 - 1)
        else:
            patch.setattr(os, "link", full)
        for _ in range(4):  # more often than an inference may be begun
            with pytest.raises(SpoolFull):
                work.infer("r1")
    assert runs == (0 if before_the_model_runs else 4)
    with database.reading() as session:
        (alarm,) = open_alarms(session)
        assert (alarm.kind, alarm.count) == ("spool-full", 4)
        assert "go on by themselves" in alarm.message
    assert work.infer("r1") == "inferred"
    with database.reading() as session:
        assert list(open_alarms(session)) == []


def test_labels_that_were_altered_on_disk_are_not_encoded(tmp_path: Path) -> None:
    spool = prepared(tmp_path / "spool")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, labels=np.ones((2, 3, 4), np.uint8))
    path, digest = spool.store_result_file("a" * 32, "r1", "labels.npz", buffer.getvalue())
    result = Result(result_id="r1", runtime={"labels": {"path": path, "sha256": digest}})
    assert step.load_labels(spool, result).shape == (2, 3, 4)
    other = io.BytesIO()
    np.savez_compressed(other, labels=np.zeros((2, 3, 4), np.uint8))
    (spool.root / path).write_bytes(other.getvalue())
    with pytest.raises(ObjectChanged, match="altered"):
        step.load_labels(spool, result)
