"""Late slices make a second version whose result replaces the first, once; repeats change nothing (CMP-17)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
from pydicom import dcmread
from sqlalchemy import func, select

from storage.records import Instance, InstanceState, ResultState
from tests.support import pacs
from tests.support.peers import require_peer
from tests.support.waiting import wait_until
from tests.support.whole_gateway import WholeGateway, running_emr, whole_gateway

_LATE = 2  # the last slices of the crop show no hippocampus


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeGateway]:
    require_peer("orthanc")
    folder = tmp_path_factory.mktemp("late")
    with (
        pacs.orthanc(folder / "pacs") as archive,
        running_emr(folder / "emr", pacs.free_port()) as emr_url,
        whole_gateway(folder / "gateway", pacs_address=(archive.ae_title, archive.port), emr_url=emr_url) as gateway,
    ):
        gateway.start_receiver()
        gateway.start("worker")
        gateway.start("services")
        yield gateway


def _count(gateway: WholeGateway, study_uid: str, state: InstanceState) -> int:
    with gateway.database.reading() as session:
        return int(
            session.scalar(
                select(func.count()).where(Instance.study_instance_uid == study_uid, Instance.state == state)
            )
            or 0
        )


def _pass_a_study_through(gateway: WholeGateway, instance: str) -> None:
    """What was sent before has been indexed and looked at once another study has gone all the way."""
    fence = gateway.write_study(instance)
    gateway.send(fence.files)
    gateway.wait_for_state(fence.uid, "verified")


@pytest.mark.requirement("REC-08")
@pytest.mark.requirement("CMP-17", open="withdrawal of the old result in the PACS")
def test_late_slices_make_one_new_version_that_replaces_the_old_result(gateway: WholeGateway) -> None:
    study = gateway.write_study("late")
    gateway.send(study.files[:-_LATE])
    gateway.wait_for_state(study.uid, "verified")
    (first,) = gateway.results(study.uid)

    gateway.send(study.files[-_LATE:])
    wait_until(lambda: len(gateway.versions(study.uid)) == 2, "the study is declared whole a second time")
    gateway.wait_for_state(study.uid, "verified")
    old, new = gateway.results(study.uid)
    assert old.result_id == first.result_id
    assert (old.state, new.state) == (ResultState.SUPERSEDED, ResultState.RELEASED)
    assert old.state_reason == f"replaced by result {new.result_id}"
    assert new.supersedes == old.result_id
    assert (new.runtime or {})["slices"] == len(study.files)

    # The new report names the old one as its predecessor, the ledger names both, and both pairs are in the PACS.
    old_objects, new_objects = gateway.objects(old.result_id), gateway.objects(new.result_id)
    report = dcmread(gateway.spool_file(new_objects["SR"].spool_path))
    predecessors = [
        item.ReferencedSOPInstanceUID
        for related in report.PredecessorDocumentsSequence
        for series in related.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    ]
    assert old_objects["SR"].sop_instance_uid in predecessors
    (superseded,) = [e.detail for e in gateway.events(study.uid) if e.kind == "superseded"]
    assert (superseded["result_id"], superseded["by"]) == (old.result_id, new.result_id)
    found = gateway.in_pacs(study.uid)
    assert sorted(found["SEG"]) == sorted(o["SEG"].sop_instance_uid for o in (old_objects, new_objects))
    assert sorted(found["SR"]) == sorted(o["SR"].sop_instance_uid for o in (old_objects, new_objects))
    assert len(gateway.reports(study.uid)) == 2
    kinds = gateway.kinds(study.uid)
    assert (kinds["declared-whole"], kinds["inferred"], kinds["released"]) == (2, 2, 2)

    # Everything once more: identical objects, so nothing runs.
    gateway.send(study.files)
    wait_until(
        lambda: _count(gateway, study.uid, InstanceState.DUPLICATE) == len(study.files), "the repeats are indexed"
    )
    _pass_a_study_through(gateway, "fence after repeats")
    assert len(gateway.versions(study.uid)) == 2
    assert len(gateway.results(study.uid)) == 2
    assert gateway.study(study.uid).state == "verified"
    assert gateway.kinds(study.uid)["inferred"] == 2
    assert gateway.in_pacs(study.uid) == found
    assert gateway.verify_ledger() > 0


@pytest.mark.requirement("CMP-17", open="withdrawal of the old result in the PACS")
def test_what_is_overtaken_before_its_inference_is_not_processed(gateway: WholeGateway) -> None:
    """The first version waits before its inference; the rest of the study comes meanwhile, and only that is run."""
    study = gateway.write_study("overtaken")
    gateway.block_at("infer:begin")
    gateway.send(study.files[:-_LATE])
    wait_until(lambda: gateway.blocked_pid("infer:begin"), "the inference of the first version is about to begin")
    gateway.send(study.files[-_LATE:])
    wait_until(lambda: len(gateway.versions(study.uid)) == 2, "the study is declared whole a second time")
    gateway.unblock("infer:begin")
    gateway.wait_for_state(study.uid, "verified")
    old, new = gateway.results(study.uid)
    wait_until(partial(_is_superseded, gateway, study.uid), "the first result is superseded")
    assert old.runtime is None
    assert (new.state, new.supersedes) == (ResultState.RELEASED, None)
    found = gateway.in_pacs(study.uid)
    assert {modality: len(uids) for modality, uids in found.items()} == {"SEG": 1, "SR": 1}
    assert gateway.kinds(study.uid)["inferred"] == 1


def _is_superseded(gateway: WholeGateway, study_uid: str) -> bool:
    return gateway.results(study_uid)[0].state == ResultState.SUPERSEDED
