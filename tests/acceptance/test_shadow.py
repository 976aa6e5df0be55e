"""A version in shadow that would give other results: PACS, EMR, study and spool are as without it, kill -9 included."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from gateway.commands.studies import study_document
from gateway.learning.registration import register
from gateway.learning.shadow import shadow_progress, start_shadow
from gateway.state import open_registry
from storage.learning_records import ShadowRun
from storage.records import Delivery, Result, ResultObject, Study
from tests.support.emr_double import EmrDouble
from tests.support.intensity_model import PHANTOM_BANDS, SWAPPED_BANDS, write_intensity_bundle
from tests.support.pacs import ScriptedPacs, scripted
from tests.support.phantoms import write_series
from tests.support.waiting import wait_until
from tests.support.whole_gateway import PATIENT_SYSTEM, WholeGateway, whole_gateway

pytestmark = pytest.mark.requirement("ART-23")

SPACING_MM = (2.0, 2.0, 2.0)
ROUTES = """
time_zone = "UTC"
[[rules]]
name = "sides"
model = "sides"
[rules.when]
all = [{ attribute = "Modality", op = "in", value = ["CT"] }]
"""
LEARNING = """
[[models]]
name = "sides"
on_drift = "nothing"
[models.change_plan]
shadow_studies = 2
"""


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[tuple[WholeGateway, ScriptedPacs, EmrDouble]]:
    pacs = ScriptedPacs(tmp_path / "pacs")
    with (
        scripted(pacs) as archive,
        EmrDouble(patients=[(PATIENT_SYSTEM, "PH-0001")]) as emr,
        whole_gateway(
            tmp_path / "gateway", pacs_address=(archive.ae_title, archive.port), emr_url=emr.base_url
        ) as gateway,
    ):
        (gateway.config / "routes.toml").write_text(ROUTES)
        (gateway.config / "learning.toml").write_text(LEARNING)
        for semver, bands in (("1.0.0", PHANTOM_BANDS), ("2.0.0", SWAPPED_BANDS)):
            bundle = write_intensity_bundle(
                tmp_path / semver, name="sides", semver=semver, spacing_mm=SPACING_MM, bands=bands
            )
            register(gateway.settings, bundle, candidate=semver != "1.0.0", actor="test")
        registry, learning = open_registry(gateway.settings), gateway.settings.learning
        start_shadow(gateway.database, registry, learning, "sides", "2.0.0", actor="user:test")
        gateway.start_receiver()
        gateway.start("worker", lives=True)
        gateway.start("services", lives=True)
        yield gateway, pacs, emr


def test_nothing_of_a_version_in_shadow_leaves_and_killed_in_its_middle_it_goes_on(
    peers: tuple[WholeGateway, ScriptedPacs, EmrDouble], tmp_path: Path
) -> None:
    gateway, pacs, emr = peers
    gateway.block_at("predict-2.0.0")
    uids = []
    for seed in range(3):
        series = write_series(tmp_path / f"study{seed}", spacing_mm=SPACING_MM, shape=(12, 16, 18), seed=seed)
        gateway.send(series.files)
        gateway.wait_for_state(series.study_instance_uid, "verified")
        uids.append(series.study_instance_uid)
    pid = wait_until(lambda: gateway.blocked_pid("predict-2.0.0") or 0, "the shadow is in the middle of an inference")
    before = (outside(pacs, emr), inside(gateway, uids))

    os.kill(pid, signal.SIGKILL)
    gateway.unblock("predict-2.0.0")
    wait_until(lambda: [r.state for r in runs(gateway)] == ["done", "done"], "both shadow runs are done")

    assert (outside(pacs, emr), inside(gateway, uids)) == before
    first, second = runs(gateway)
    assert (first.attempts, second.attempts) == (2, 1)
    for run in (first, second):
        assert (run.verdict, run.dice) == ("hold", {"left structure": 0.0, "right structure": 0.0})
    # What the outside has is what the champion made, and all of it.
    objects = [
        o.sop_instance_uid for uid in uids for r in gateway.results(uid) for o in gateway.objects(r.result_id).values()
    ]
    assert sorted(pacs.received) == sorted(objects)
    assert len(objects) == 6
    for uid in uids:
        (result,) = gateway.results(uid)
        (report,) = gateway.reports(uid)
        assert (result.model_version, result.report_id) == ("1.0.0", f"DiagnosticReport/{report['id']}")
    with gateway.database.reading() as session:
        progress = shadow_progress(session, "sides", "2.0.0", wanted=2)
    assert (progress.is_enough, progress.failed, progress.other_verdicts) == (True, 0, {"pass → hold": 2})
    assert gateway.verify_ledger() > 0


def runs(gateway: WholeGateway) -> list[ShadowRun]:
    with gateway.database.reading() as session:
        return list(session.scalars(select(ShadowRun).order_by(ShadowRun.shadow_id)))


def outside(pacs: ScriptedPacs, emr: EmrDouble) -> tuple[list[str], list[tuple[str, str, bytes]]]:
    """What arrived at the PACS, and what was written to the EMR."""
    return list(pacs.received), [(s.method, s.path, s.body) for s in emr.seen if s.method != "GET"]


def inside(gateway: WholeGateway, uids: list[str]) -> dict[str, Any]:
    """The studies' documents, deliveries and objects with their bytes, and every file of the spool with its size."""
    spool = gateway.settings.spool_dir
    with gateway.database.reading() as session:
        return {
            "documents": [study_document(session, session.get_one(Study, uid)) for uid in uids],
            "results": session.scalar(select(func.count()).select_from(Result)),
            "deliveries": sorted(map(repr, session.execute(select(Delivery.__table__)))),
            "bytes": session.scalar(select(func.sum(ResultObject.size_bytes))),
            "spool": {
                str(p.relative_to(spool)): p.stat().st_size
                for p in sorted((spool / "studies").rglob("*"))
                if p.is_file()
            },
        }
