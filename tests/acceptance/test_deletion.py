"""A running gateway deletes: by retention, whose worker is killed in the middle, and on request, while a model is at
work. What is sent again afterwards is processed like any other study."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from storage import ledger
from storage.records import Study
from tests.support.finished_study import files_in
from tests.support.waiting import wait_until
from tests.support.whole_gateway import WholeGateway, gateway_to_an_archive

pytestmark = pytest.mark.requirement("OPS-57", "CARD-05")


# Its disk is always too full: everything goes that may, as soon as the job runs.
POLICY = {
    "SEGGATE_LATE_WINDOW_S": "0.001",
    "SEGGATE_RETENTION__START_BELOW_MB": str(1 << 30),
    "SEGGATE_RETENTION__KEEP_DAYS": "0",
    "SEGGATE_RETENTION__KEEP_UNREVIEWED": "false",
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeGateway]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in POLICY.items():
            environment.setenv(name, value)
        with gateway_to_an_archive(tmp_path_factory.mktemp("deletion")) as gateway:
            yield gateway


@pytest.fixture(autouse=True)
def _policy(monkeypatch: pytest.MonkeyPatch, _clean_environment: None) -> None:
    """For commands in this process."""
    for name, value in POLICY.items():
        monkeypatch.setenv(name, value)


def run(gateway: WholeGateway, *words: str) -> Any:
    ran = CliRunner().invoke(app, [*words, "--json", "--config", str(gateway.config)])
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout)


def is_here(gateway: WholeGateway, uid: str) -> bool:
    gateway.check_alive()
    with gateway.database.reading() as session:
        return session.get(Study, uid) is not None


def test_retention_whose_worker_is_killed_goes_on_and_the_study_sent_again_is_new(gateway: WholeGateway) -> None:
    study = gateway.write_study("retention")
    gateway.send(study.files)
    gateway.wait_for_state(study.uid, "verified")
    (first,) = gateway.results(study.uid)
    before = gateway.in_pacs(study.uid)

    planned = run(gateway, "retention", "--dry-run")
    reasons = [reason for one in planned["staying"] for reason in one["reasons"]]
    assert ([one["study_uid"] for one in planned["going"]], reasons) == ([study.uid], [])
    gateway.kill_at("deletion rows going")
    run(gateway, "schedule", "run", "retention")
    gateway.wait_for_death_at("deletion rows going")
    gateway.end("worker")
    gateway.start("worker")
    wait_until(lambda: not is_here(gateway, study.uid), "the study is gone")
    wait_until(lambda: files_in(gateway.settings.spool_dir / "studies") == [], "its files are gone")
    assert [event.kind for event in gateway.events(study.uid)][-1] == "study-removed"
    assert gateway.in_pacs(study.uid) == before

    gateway.send(study.files)
    wait_until(lambda: is_here(gateway, study.uid), "the study is here again")
    gateway.wait_for_state(study.uid, "verified")
    (second,) = gateway.results(study.uid)
    assert second.result_id != first.result_id
    after = gateway.in_pacs(study.uid)
    assert len(after["SEG"]) == len(set(after["SEG"])) == 2
    assert set(before["SEG"]) < set(after["SEG"])
    assert gateway.verify_ledger() > 0


def test_on_request_a_study_goes_while_a_model_is_at_work_on_it(gateway: WholeGateway) -> None:
    study = gateway.write_study("request")
    gateway.block_at("predict")
    gateway.send(study.files)
    wait_until(lambda: gateway.blocked_pid("predict"), "the model is at work")
    (result,) = gateway.results(study.uid)
    asked = ["delete", study.uid, "--reason", "asked for by its owner", "--yes"]
    refused = CliRunner().invoke(app, [*asked, "--config", str(gateway.config)])
    assert (refused.exit_code, "a model is at work" in refused.stderr) == (1, True)
    deleted = run(gateway, *asked, "--force")
    assert deleted["in_spite_of"] == ["not-finished", "state"]
    gateway.unblock("predict")

    other = gateway.write_study("other")
    gateway.send(other.files)
    gateway.wait_for_state(other.uid, "verified")
    assert not is_here(gateway, study.uid)
    assert gateway.in_pacs(study.uid) == {}
    run(gateway, "retention", "--yes")
    assert not [name for name in files_in(gateway.settings.spool_dir) if result.result_id in name]
    with gateway.database.reading() as session:
        assert ledger.events(session, ledger.study_subject(study.uid)) == []
        reasons = [event.detail["reason"] for event in ledger.events(session, ledger.DELETIONS)]
    assert reasons.count("asked for by its owner") == 1
    assert gateway.verify_ledger() > 0
