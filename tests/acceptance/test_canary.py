"""Canaries in a whole gateway: real C-STORE, real model, a PACS and an EMR that must never hear of them (OPS-59)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from sqlalchemy import func, select

from gateway.demo.synthetic_study import PATIENT_ID as DEMO_PATIENT
from gateway.learning.registration import register
from gateway.monitoring.canary_series import PATIENT_ID
from gateway.sending import send_files
from gateway.setting_types import PeerAddress
from storage.canary_records import CANARY_RULE, CanaryRun
from storage.records import Delivery, Result, ResultState, StudyFacts
from storage.spool import study_key
from tests.support.intensity_model import PHANTOM_BANDS, SWAPPED_BANDS, write_intensity_bundle
from tests.support.pacs import ScriptedPacs, free_port, scripted
from tests.support.peers import ROOT
from tests.support.sanity_bundle import SPACING_MM, asymmetric_case, with_sanity_cases
from tests.support.waiting import PATIENCE_S, wait_until
from tests.support.whole_gateway import WholeGateway, running_emr, whole_gateway

Json = dict[str, Any]
# Never while a test runs: it starts canaries itself.
CANARY = '[scheduler]\ncanary_cron = "0 0 29 2 *"\n[canary]\nkeep_days = 0\n'
DEMO, GOOD, EXCHANGED = "hippocampus-mr", "sides", "sides-exchanged"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeGateway]:
    """All models serve: the demo's, one that is right, and one whose weights give what its bundle does not say. The EMR
    knows the canary's patient: a report on it would be filed."""
    folder = tmp_path_factory.mktemp("canary")
    patients = (DEMO_PATIENT, PATIENT_ID)
    with (
        scripted(ScriptedPacs(folder / "pacs")) as archive,
        running_emr(folder / "emr", free_port(), patients=patients) as emr_url,
        whole_gateway(
            folder / "gateway", pacs_address=(archive.ae_title, archive.port), emr_url=emr_url, more=CANARY
        ) as gateway,
    ):
        for name, bands in ((GOOD, PHANTOM_BANDS), (EXCHANGED, SWAPPED_BANDS)):
            bundle = write_intensity_bundle(folder / name, name=name, bands=bands, spacing_mm=SPACING_MM)
            bundle = with_sanity_cases(bundle, {"site-1": asymmetric_case()})
            register(gateway.settings, bundle, candidate=False, actor="test")
        gateway.start_receiver()
        gateway.start("worker")
        gateway.start("services")
        yield gateway


def canary(gateway: WholeGateway, *names: str) -> tuple[int, dict[str, Json]]:
    """Exit code and answers of `seggate canary`, by model."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "canary", *names, "--json", "--config", str(gateway.config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.stdout, done.stderr
    return done.returncode, {entry["model"].split()[0]: entry for entry in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def answers(gateway: WholeGateway) -> dict[str, Json]:
    code, found = canary(gateway)
    assert code == 1, found
    return found


@pytest.mark.requirement("OPS-59")
def test_a_model_that_gives_what_its_bundle_says_is_good(gateway: WholeGateway, answers: dict[str, Json]) -> None:
    for name in (DEMO, GOOD):
        found = answers[name]
        assert (found["outcome"], found["detail"]) == ("good", None), gateway.story(found["study"])
        assert min(value for value in found["dice"].values() if value is not None) > 0.999
        (result,) = gateway.results(found["study"])
        assert (result.rule, result.state, result.model_name) == (CANARY_RULE, ResultState.RELEASED, name)
    assert {alarm.subject for alarm in gateway.alarms("canary")} == {f"model:{EXCHANGED}"}


@pytest.mark.requirement("OPS-59")
def test_weights_that_give_other_labels_are_an_alarm_although_objects_were_made(
    gateway: WholeGateway, answers: dict[str, Json]
) -> None:
    found = answers[EXCHANGED]
    assert found["outcome"] == "wrong"
    assert "left structure: Dice 0.000 to what the bundle says, at least 0.95" in found["detail"]
    assert "there is no" not in found["detail"]
    (alarm,) = gateway.alarms("canary")
    assert f"the canary of {EXCHANGED}: version 1.0.0, left structure: Dice" in alarm.message
    (result,) = gateway.results(found["study"])
    assert set(gateway.objects(result.result_id)) == {"SEG", "SR"}
    segmentation = dcmread(gateway.spool_file(gateway.objects(result.result_id)["SEG"].spool_path))
    assert segmentation.PatientID == PATIENT_ID
    assert np.any(segmentation.pixel_array)


@pytest.mark.requirement("OPS-59")
def test_nothing_of_a_canary_reaches_pacs_or_emr_and_a_patients_study_does(
    gateway: WholeGateway, answers: dict[str, Json]
) -> None:
    study = gateway.write_study("after the canaries")
    gateway.send(study.files)
    gateway.wait_for_state(study.uid, "verified")
    for found in answers.values():
        assert gateway.in_pacs(found["study"]) == {}
        assert gateway.reports(found["study"]) == []
    assert {modality: len(uids) for modality, uids in gateway.in_pacs(study.uid).items()} == {"SEG": 1, "SR": 1}
    in_emr = gateway.folder.parent / "emr" / "emr"  # everything that the EMR has, a file for each resource
    assert len(list(in_emr.glob("DiagnosticReport-*.json"))) == 1
    assert len(list((gateway.folder.parent / "pacs").rglob("*.dcm"))) == 2
    with gateway.database.reading() as session:
        deliveries = session.scalars(select(Delivery.result_id)).all()
        facts = session.scalars(select(StudyFacts.result_id)).all()
    (result,) = gateway.results(study.uid)
    assert set(deliveries) == {result.result_id}
    assert facts == [result.result_id]
    listed = json.loads(gateway.command("studies", "--json"))
    assert [row["study_uid"] for row in listed] == [study.uid]


def test_who_borrows_the_canarys_title_on_this_host_is_run_by_nobody(gateway: WholeGateway) -> None:
    study = gateway.write_study("a stranger")
    peer = PeerAddress(ae_title="SEGGATE", host="127.0.0.1", port=gateway.port)
    assert send_files(study.files, peer, calling_ae="SEGGATE_CANARY").is_complete
    gateway.wait_for_state(study.uid, "unmatched")
    assert gateway.results(study.uid) == []


@pytest.mark.requirement("OPS-59")
@pytest.mark.requirement("CARD-05")
def test_the_job_compares_by_itself_removes_the_old_ones_and_a_good_one_ends_the_alarm(
    gateway: WholeGateway, answers: dict[str, Json], tmp_path: Path
) -> None:
    right = write_intensity_bundle(
        tmp_path / "right", name=EXCHANGED, semver="1.1.0", bands=PHANTOM_BANDS, spacing_mm=SPACING_MM
    )
    right = with_sanity_cases(right, {"site-1": asymmetric_case()})
    register(gateway.settings, right, candidate=True, actor="test")
    gateway.command("models", "promote", EXCHANGED, "1.1.0", "--force", "--reason", "a test")
    gateway.command("schedule", "run", "canary")

    def good() -> list[CanaryRun]:
        with gateway.database.reading() as session:
            found = session.scalars(
                select(CanaryRun).where(CanaryRun.outcome == "good", CanaryRun.removed_at.is_(None))
            )
            return [run for run in found.all() if run.model_version == "1.1.0"]

    wait_until(good, "the canary of the version that is right was compared")
    assert gateway.alarms("canary") == []
    assert gateway.alarms("job-failed") == []
    for found in answers.values():
        assert not (gateway.settings.spool_dir / "studies" / study_key(found["study"])).exists()
        assert gateway.kinds(found["study"])["canary-removed"] == 1
        assert gateway.results(found["study"]) == []
    gateway.verify_ledger()


@pytest.mark.requirement("OPS-59")
def test_without_a_worker_it_is_slow(gateway: WholeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway.end("worker")
    monkeypatch.setenv("SEGGATE_CANARY__RESULT_WITHIN_S", "3")
    code, found = canary(gateway, GOOD)
    assert (code, found[GOOD]["outcome"]) == (1, "wrong")
    assert found[GOOD]["detail"].startswith("slow: no result within 3 s; its study is receiving")
    assert [alarm.subject for alarm in gateway.alarms("canary")] == [f"model:{GOOD}"]
    with gateway.database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Result).where(Result.state == "pending")) == 0
