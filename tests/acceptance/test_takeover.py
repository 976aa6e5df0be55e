"""A worker that dies for good is taken over; one that is stuck is ended, tried again and parked (QUE-28)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial

import pytest

from storage.records import ResultState
from tests.support.pacs import free_port
from tests.support.waiting import wait_until
from tests.support.whole_gateway import WholeGateway, whole_gateway

_BEAT_S, _TAKEOVER_S, _DEADLINE_S, _ATTEMPTS = 0.3, 2.0, 6.0, 2
# What the machine may add: both workers and the tests beside them share its cores.
_SLACK_S = 20.0


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeGateway]:
    """Without delivery: what a worker does is under test, and its work is done when the study is delivering."""
    nobody = ("NONE", free_port())
    with whole_gateway(
        tmp_path_factory.mktemp("takeover") / "gateway",
        pacs_address=nobody,
        emr_url=f"http://127.0.0.1:{nobody[1]}/fhir",
        worker=f"attempts = {_ATTEMPTS}\nheartbeat_s = {_BEAT_S}\ntakeover_s = {_TAKEOVER_S}\n"
        f"inference_deadline_s = {_DEADLINE_S}",
    ) as gateway:
        gateway.start_receiver()
        yield gateway


@pytest.mark.requirement("QUE-28", open="hung driver calls on a real GPU")
@pytest.mark.parametrize("point", ["infer:begin", "predict"])
def test_a_worker_that_dies_for_good_is_taken_over_in_time(gateway: WholeGateway, point: str) -> None:
    study = gateway.write_study(f"takeover {point}")
    names = {"a": f"worker a {point}", "b": f"worker b {point}"}
    for executor, name in names.items():
        gateway.start(name=name, group="worker", executor=executor)
    for executor in names:
        gateway.wait_for_executor(f".{executor}")
    taken_before = [e for e in gateway.gateway_events() if e.kind == "takeover"]
    gateway.kill_at(point)
    gateway.send(study.files)
    gateway.wait_for_death_at(point)
    gateway.wait_for_state(study.uid, "delivering")

    (dead,) = [executor for executor, name in names.items() if gateway.processes[name].poll() == -9]
    (takeover,) = [e for e in gateway.gateway_events() if e.kind == "takeover"][len(taken_before) :]
    assert takeover.detail["dead"].endswith(f".{dead}")
    assert not takeover.actor.endswith(f".{dead}")
    last_beat = gateway.executor(f".{dead}")
    assert last_beat is not None
    silent_s = (takeover.at - last_beat.beat_at).total_seconds()
    assert _TAKEOVER_S <= silent_s < _TAKEOVER_S + _SLACK_S
    (result,) = gateway.results(study.uid)
    assert result.state == ResultState.RELEASED
    kinds = gateway.kinds(study.uid)
    assert (kinds["inferred"], kinds["released"], kinds["parked"]) == (1, 1, 0)
    gateway.end(*names.values())


@pytest.mark.requirement("QUE-28", open="hung driver calls on a real GPU")
def test_a_stuck_inference_is_ended_tried_again_parked_and_put_back_by_retry(gateway: WholeGateway) -> None:
    study = gateway.write_study("stuck")
    gateway.block_at("predict")
    gateway.start_supervised("worker")
    gateway.send(study.files)
    stuck: list[int] = []
    for attempt in range(_ATTEMPTS):
        stuck.append(wait_until(partial(_another, gateway, stuck), f"inference {attempt + 1} is stuck"))
        began = datetime.now(UTC)
        wait_until(partial(_has_ended, stuck[-1]), "the supervisor has ended the stuck worker")
        assert (datetime.now(UTC) - began).total_seconds() < _DEADLINE_S + _SLACK_S
    gateway.wait_for_state(study.uid, "failed")

    (result,) = gateway.results(study.uid)
    assert result.state == ResultState.FAILED
    assert gateway.study(study.uid).state_reason == result.state_reason
    assert str(result.state_reason).startswith("infer: Permanent: inference was begun 2 times and never finished")
    assert [a.subject for a in gateway.alarms("parked")] == [f"study:{study.uid}"]

    gateway.unblock("predict")
    gateway.command("retry", study.uid)
    gateway.wait_for_state(study.uid, "delivering")
    kinds = gateway.kinds(study.uid)
    assert {k: kinds[k] for k in ("ordered", "parked", "retried", "inferred", "released")} == {
        "ordered": 1,
        "parked": 1,
        "retried": 1,
        "inferred": 1,
        "released": 1,
    }
    assert gateway.alarms("parked") == []
    assert gateway.verify_ledger() > 0


def _another(gateway: WholeGateway, known: list[int]) -> int:
    """The process that is blocked in an inference, 0 if it is one of the known."""
    pid = gateway.blocked_pid("predict") or 0
    return 0 if pid in known else pid


def _has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
