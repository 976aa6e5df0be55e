"""A bad version is promoted: the gateway goes back by itself, and each study has one result, by the stable version.

One gateway with a PACS and an EMR, one model for each way to be bad. The first rollback is cut short by kill -9 between
the registry and the results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from sqlalchemy import select

from gateway.learning.registration import register
from gateway.state import open_registry
from storage.learning_records import ReviewTask
from storage.records import LedgerEvent, Result, ResultState
from tests.support.emr_double import EmrDouble
from tests.support.intensity_model import SWAPPED_BANDS, write_intensity_bundle
from tests.support.live_studies import BLIND_BANDS, begin_period
from tests.support.pacs import ScriptedPacs, scripted
from tests.support.phantoms import PhantomSeries, write_series
from tests.support.waiting import wait_until
from tests.support.whole_gateway import PATIENT_SYSTEM, WholeGateway, whole_gateway

pytestmark = pytest.mark.requirement("ART-23")

SPACING_MM = (2.0, 2.0, 2.0)
BAD: dict[str, dict[str, Any]] = {
    "swapped": {"bands": SWAPPED_BANDS},  # held for its sides
    "blind": {"bands": BLIND_BANDS},  # finds nothing
    "raising": {"raises": True},  # no image gets through
    "changed": {"bands": SWAPPED_BANDS},  # its files are not those that were registered
}
RULE = """
[[rules]]
name = "{name}"
model = "{name}"
[rules.when]
all = [{{ attribute = "SeriesDescription", op = "equals", value = "{name}" }}]
"""


@dataclass(frozen=True)
class Ward:
    gateway: WholeGateway
    pacs: ScriptedPacs
    emr: EmrDouble
    folder: Path

    def send(self, name: str, number: int) -> PhantomSeries:
        """One study that the routes file sends to the model `name`."""
        seed = 100 * list(BAD).index(name) + number
        series = write_series(
            self.folder / name / str(number), spacing_mm=SPACING_MM, shape=(12, 16, 18), seed=seed,
            series_description=name,
        )  # fmt: skip
        self.gateway.send(series.files)
        return series

    def wait(self, study_uid: str, *states: str) -> None:
        """Until the study is in one of the states; on its way it may be held or parked."""

        def reached() -> bool:
            self.gateway.check_alive()
            with self.gateway.database.reading() as session:
                return (
                    session.scalars(select(Result.result_id).where(Result.study_instance_uid == study_uid)).first()
                    is not None
                    and self.gateway.study(study_uid).state in states
                )

        try:
            wait_until(reached, f"study {study_uid} is {' or '.join(states)}", timeout_s=120)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.gateway.story(study_uid)}") from error

    def champion(self, name: str) -> str:
        return open_registry(self.gateway.settings).champion(name).semver


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    folder = tmp_path_factory.mktemp("rollback")
    pacs = ScriptedPacs(folder / "pacs")
    with (
        scripted(pacs) as archive,
        EmrDouble(patients=[(PATIENT_SYSTEM, "PH-0001")]) as emr,
        whole_gateway(
            folder / "gateway",
            pacs_address=(archive.ae_title, archive.port),
            emr_url=emr.base_url,
            worker="attempts = 2",
        ) as gateway,
    ):
        rules = "".join(RULE.format(name=name) for name in BAD)
        (gateway.config / "routes.toml").write_text(f'time_zone = "UTC"\n{rules}')
        registry = open_registry(gateway.settings)
        for name, how in BAD.items():
            for semver, kind in (("1.0.0", {}), ("2.0.0", how)):
                bundle = write_intensity_bundle(
                    folder / "bundles" / name / semver, name=name, semver=semver, spacing_mm=SPACING_MM, **kind
                )
                register(gateway.settings, bundle, candidate=semver != "1.0.0", actor="test")
            promoted = registry.promote(name, "2.0.0")
            with gateway.database.session() as session:
                begin_period(session, promoted, previous="1.0.0")
        (registry.get("changed", "2.0.0").folder / "3d_fullres" / "fold_0.onnx").write_bytes(b"other")
        gateway.start_receiver()
        gateway.start("worker", lives=True)
        gateway.start("services", lives=True)
        yield Ward(gateway, pacs, emr, folder)


@pytest.mark.parametrize("name", BAD)
def test_each_study_ends_with_one_result_by_the_stable_version_that_was_delivered_once(ward: Ward, name: str) -> None:
    gateway = ward.gateway
    if name == "swapped":
        gateway.kill_at("withdraw-swapped")
    sent = [ward.send(name, number) for number in range(2)]
    if name != "changed":
        for series in sent:
            ward.wait(series.study_instance_uid, "held", "failed")
        assert ward.champion(name) == "2.0.0"
    sent.append(ward.send(name, 2))
    if name == "swapped":
        gateway.wait_for_death_at("withdraw-swapped")
        assert ward.champion(name) == "1.0.0"
    for series in sent:
        ward.wait(series.study_instance_uid, "verified")
    after = ward.send(name, 3)
    ward.wait(after.study_instance_uid, "verified")

    assert ward.champion(name) == "1.0.0"
    bad: list[str] = []
    for series in [*sent, after]:
        uid = series.study_instance_uid
        results = gateway.results(uid)
        (current,) = [r for r in results if r.state != ResultState.SUPERSEDED]
        assert (current.model_version, current.state) == ("1.0.0", ResultState.RELEASED)
        bad += [r.result_id for r in results if r.model_version == "2.0.0"]
        assert {r.model_version for r in results if r is not current} <= {"2.0.0"}
        # The outside has what the stable version made, once, and it says so.
        objects = gateway.objects(current.result_id)
        assert gateway.in_pacs(uid) == {role: [objects[role].sop_instance_uid] for role in ("SEG", "SR")}
        assert [ward.pacs.received.count(o.sop_instance_uid) for o in objects.values()] == [1, 1]
        segmentation = dcmread(gateway.spool_file(objects["SEG"].spool_path))
        algorithm = segmentation.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
        assert algorithm.AlgorithmVersion == "1.0.0"
        (report,) = gateway.reports(uid)
        assert current.report_id == f"DiagnosticReport/{report['id']}"
        kinds = gateway.kinds(uid)
        assert (kinds["released"], kinds["delivery-verified"]) == (1, 2)
    assert len(bad) == (0 if name == "changed" else 3)

    with gateway.database.reading() as session:
        events = session.scalars(select(LedgerEvent).where(LedgerEvent.subject == f"model:{name}")).all()
        task = session.scalars(select(ReviewTask).where(ReviewTask.model_name == name)).one()
    told = {e.kind: e.detail for e in events if e.kind in ("model-rolled-back", "results-withdrawn")}
    assert sorted(told["results-withdrawn"]["done_again"]["result_ids"]) == sorted(bad)
    assert told["results-withdrawn"]["released"]["count"] == 0
    reason = {
        "swapped": "of its first 3 studies 3 were held by QA (limit 50%)",
        "blind": "of its first 3 studies 3 were held by QA (limit 50%)",
        "raising": "of its first 3 studies 3 failed (limit 20%)",
        "changed": "at the start of a worker: ",
    }[name]
    assert told["model-rolled-back"]["reason"].startswith(reason)
    assert (task.kind, task.model_version) == ("rollback", "2.0.0")
    assert [a.message for a in gateway.alarms("model-rolled-back") if a.subject == f"model:{name}"] == [task.summary]
    left = {a.subject for kind in ("parked", "result-held") for a in gateway.alarms(kind)}
    assert left.isdisjoint({f"study:{series.study_instance_uid}" for series in sent})
    assert gateway.verify_ledger() > 0
