"""Results that come back by auto-routing are recognised, by their own gateway and by another one (OUT-46)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from storage.records import Instance, InstanceState
from tests.support.pacs import free_port
from tests.support.waiting import wait_until
from tests.support.whole_gateway import SentStudy, WholeGateway, gateway_to_an_archive, whole_gateway


@pytest.fixture(scope="module")
def sender(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeGateway]:
    """The gateway that makes the result. Its PACS is our archive; there is no EMR."""
    folder = tmp_path_factory.mktemp("loop")
    with gateway_to_an_archive(folder) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def study(sender: WholeGateway) -> SentStudy:
    study = sender.write_study("loop")
    sender.send(study.files)
    sender.wait_for_state(study.uid, "verified")
    return study


def _result_files(gateway: WholeGateway, study: SentStudy) -> list[Path]:
    (result,) = gateway.results(study.uid)
    return [gateway.spool_file(item.spool_path) for item in gateway.objects(result.result_id).values()]


def _own(gateway: WholeGateway, study_uid: str) -> int:
    with gateway.database.reading() as session:
        rows = session.scalars(select(Instance).where(Instance.study_instance_uid == study_uid)).all()
    return sum(row.state == InstanceState.OWN_RESULT for row in rows)


@pytest.mark.requirement("OUT-46")
def test_results_that_come_back_change_nothing(sender: WholeGateway, study: SentStudy) -> None:
    files = _result_files(sender, study)
    assert len(files) == 2
    sender.send(files)
    wait_until(lambda: _own(sender, study.uid) == 2, "the SEG and the SR are recognised as our own")
    fence = sender.write_study("fence in the loop")
    sender.send(fence.files)
    sender.wait_for_state(fence.uid, "verified")
    assert len(sender.versions(study.uid)) == 1
    assert len(sender.results(study.uid)) == 1
    assert sender.study(study.uid).state == "verified"


@pytest.mark.requirement("OUT-46")
def test_another_gateway_recognises_them_too_alone_or_within_their_study(
    sender: WholeGateway, study: SentStudy, tmp_path: Path
) -> None:
    files = _result_files(sender, study)
    nobody = ("NONE", free_port())
    with whole_gateway(tmp_path / "other", pacs_address=nobody, emr_url=f"http://127.0.0.1:{nobody[1]}/fhir") as other:
        other.start_receiver()
        other.start("worker")
        other.send(files)
        wait_until(lambda: _own(other, study.uid) == 2, "the SEG and the SR are recognised as a gateway's")
        assert other.versions(study.uid) == []

        other.send([*study.files, *files])
        other.wait_for_state(study.uid, "delivering")  # nobody delivers here: its results are made
        (version,) = other.versions(study.uid)
        assert len(version.object_ids) == len(study.files)
        assert len(other.results(study.uid)) == 1
