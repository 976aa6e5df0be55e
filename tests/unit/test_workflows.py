"""The story of a study with the durable engine replaced: order of steps, waits, parking, deliveries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from engine.errors import BackendFailed, InputRejected
from gateway.errors import Permanent, Transient
from gateway.workflows import Story
from storage.errors import DatabaseAway, SpoolFull, SpoolUnsafe


class Steps:
    """Answers each step with the next of its script (the last one again), and notes every call."""

    def __init__(self, **scripts: Any) -> None:
        self.scripts = {name: list(s) if isinstance(s, list) else [s] for name, s in scripts.items()}
        self.calls: list[tuple[str, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def step(*arguments: str) -> Any:
            self.calls.append((name, *arguments))
            script = self.scripts[name]
            answer = script.pop(0) if len(script) > 1 else script[0]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return step

    @property
    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class Engine:
    """Runs a step at once; notes the waits and what the boundary heard."""

    def __init__(self, attempts: int = 3) -> None:
        self.waits: list[float] = []
        self.boundaries: list[str] = []
        self.story = Story(
            attempts=attempts,
            boundary=self.boundaries.append,
            wait=self.waits.append,
            step=lambda name, function, *arguments: function(*arguments),
        )


STUDY = {"route": "matched", "order": "ordered", "park_study": "parked"}
RESULT = {"infer": "inferred", "judge": "pass", "encode": "encoded", "release": "released", "park_result": "parked"}


def test_a_study_is_routed_and_its_results_ordered() -> None:
    engine, steps = Engine(), Steps(**STUDY)
    assert engine.story.process_study(steps, "v1") == "ordered"
    assert steps.calls == [("route", "v1"), ("order", "v1")]
    assert engine.boundaries == ["route:begin", "route:end", "order:begin", "order:end"]


@pytest.mark.parametrize("outcome", ["unmatched", "review"])
def test_a_study_that_no_rule_wants_is_not_ordered(outcome: str) -> None:
    steps = Steps(**(STUDY | {"route": outcome}))
    assert Engine().story.process_study(steps, "v1") == outcome
    assert steps.names == ["route"]


def test_a_result_is_inferred_judged_encoded_and_released_in_this_order() -> None:
    steps = Steps(**RESULT)
    assert Engine().story.make_result(steps, "r1") == "released"
    assert steps.names == ["infer", "judge", "encode", "release"]


def test_a_result_that_was_superseded_meanwhile_goes_no_further() -> None:
    steps = Steps(**(RESULT | {"infer": "superseded"}))
    assert Engine().story.make_result(steps, "r1") == "superseded"
    assert steps.names == ["infer"]


@pytest.mark.requirement("ART-23")
def test_a_result_whose_model_was_withdrawn_as_it_was_judged_goes_no_further() -> None:
    steps = Steps(**(RESULT | {"judge": "superseded"}))
    assert Engine().story.make_result(steps, "r1") == "superseded"
    assert steps.names == ["infer", "judge"]


@pytest.mark.requirement("ART-23")
def test_a_version_in_shadow_that_fails_is_parked_by_its_own_step() -> None:
    steps = Steps(compare=[BackendFailed("device lost"), Permanent("no network")], park_shadow="failed")
    assert Engine(attempts=3).story.shadow_result(steps, "7", "turn") == "failed"
    assert steps.calls == [
        ("compare", "7", "turn"),
        ("compare", "7", "turn"),
        ("park_shadow", "7", "compare", "Permanent: no network"),
    ]


def test_a_held_result_is_still_encoded_and_release_decides() -> None:
    steps = Steps(**(RESULT | {"judge": "hold", "release": "held"}))
    assert Engine().story.make_result(steps, "r1") == "held"
    assert steps.names == ["infer", "judge", "encode", "release"]


def test_a_transient_failure_is_waited_for_with_growing_pauses_and_tried_again() -> None:
    engine = Engine(attempts=3)
    steps = Steps(**(RESULT | {"infer": [BackendFailed("device lost"), Transient("again"), "inferred"]}))
    assert engine.story.make_result(steps, "r1") == "released"
    assert steps.names == ["infer"] * 3 + ["judge", "encode", "release"]
    assert engine.waits == [2.0, 4.0]


def test_a_transient_failure_that_stays_is_parked_with_step_and_reason() -> None:
    engine = Engine(attempts=3)
    steps = Steps(**(RESULT | {"encode": Transient("disk is full")}))
    assert engine.story.make_result(steps, "r1") == "parked"
    assert steps.names == ["infer", "judge", "encode", "encode", "encode", "park_result"]
    assert steps.calls[-1] == ("park_result", "r1", "encode", "Transient: disk is full")
    assert engine.waits == [2.0, 4.0]


@pytest.mark.requirement("QUE-27")
@pytest.mark.parametrize("error", [SpoolFull("no space"), SpoolUnsafe("read-only"), DatabaseAway("locked")])
def test_a_result_waits_for_disk_and_database_however_long_and_goes_on(error: Exception) -> None:
    engine = Engine(attempts=3)
    steps = Steps(**(RESULT | {"encode": [*[error] * 20, "encoded"]}))
    assert engine.story.make_result(steps, "r1") == "released"
    assert engine.waits == [2.0, 4.0, 8.0, 16.0, 32.0, *[60.0] * 15]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Permanent("the model is gone"), "Permanent: the model is gone"),
        (InputRejected("shape"), "Rejected: shape"),
        (ZeroDivisionError(), "Permanent: ZeroDivisionError"),
    ],
)
def test_any_other_failure_is_parked_at_once(error: Exception, reason: str) -> None:
    engine = Engine()
    steps = Steps(**(RESULT | {"infer": error}))
    assert engine.story.make_result(steps, "r1") == "parked"
    assert steps.calls[-1] == ("park_result", "r1", "infer", reason)
    assert engine.waits == []


@pytest.mark.parametrize(
    ("error", "traceback"),
    [
        (SpoolFull("no space"), False),
        (Permanent("the model is gone"), False),
        (InputRejected("shape"), False),
        (ZeroDivisionError("by zero"), True),
    ],
)
def test_only_an_unforeseen_failure_has_a_traceback_in_the_log(error: Exception, traceback: bool) -> None:
    with capture_logs() as lines:
        Engine().story.make_result(Steps(**(RESULT | {"infer": [error, "inferred"]})), "r1")
    (line,) = [entry for entry in lines if entry["event"] == "step failed"]
    assert line["exc_info"] is traceback
    assert (line["step"], line["subject"], line["error"]) == ("infer", "r1", type(error).__name__)
    assert str(error) in line["reason"]


def test_a_study_whose_routing_fails_is_parked() -> None:
    steps = Steps(**(STUDY | {"order": Permanent("no model")}))
    assert Engine().story.process_study(steps, "v1") == "parked"
    assert steps.calls[-1] == ("park_study", "v1", "order", "Permanent: no model")


def test_pauses_between_attempts_are_capped_at_a_minute() -> None:
    engine = Engine(attempts=9)
    steps = Steps(**(RESULT | {"infer": Transient("away")}))
    engine.story.make_result(steps, "r1")
    assert engine.waits == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


@pytest.mark.requirement("QUE-29", open="rate cap; urgent first in the drain; an outage of hours")
def test_a_delivery_is_attempted_until_it_says_that_nothing_is_left() -> None:
    engine = Engine()
    steps = Steps(
        attempt=[
            {"state": "queued", "retry_in_s": 5.0},
            {"state": "sent", "retry_in_s": 0.5},
            {"state": "verified", "retry_in_s": None},
        ]
    )
    assert engine.story.deliver(steps, "d1", "w1") == "verified"
    assert steps.calls == [("attempt", "d1", "w1")] * 3
    assert engine.waits == [5.0, 0.5]


def test_a_delivery_that_cannot_be_made_is_parked() -> None:
    steps = Steps(attempt=Permanent("another file"), park_delivery="parked")
    assert Engine().story.deliver(steps, "d1", "w1") == "parked"
    assert steps.calls[-1] == ("park_delivery", "d1", "attempt", "Permanent: another file")


def test_the_boundary_of_a_failed_step_has_no_end() -> None:
    engine = Engine()
    engine.story.make_result(Steps(**(RESULT | {"infer": Permanent("no")})), "r1")
    assert engine.boundaries == ["infer:begin", "park:begin", "park:end"]


def test_a_delivery_is_not_parked_because_the_gateway_itself_was_in_trouble() -> None:
    engine = Engine(attempts=3)
    steps = Steps(attempt=[*[Transient("database locked")] * 9, {"state": "verified", "retry_in_s": None}])
    assert engine.story.deliver(steps, "d1", "w1") == "verified"
    assert engine.waits == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0]


def test_parking_is_not_given_up_while_the_trouble_may_pass() -> None:
    engine = Engine(attempts=2)
    steps = Steps(**(RESULT | {"judge": Permanent("no"), "park_result": [*[Transient("away")] * 4, "parked"]}))
    assert engine.story.make_result(steps, "r1") == "parked"
    assert steps.names == ["infer", "judge", *["park_result"] * 5]


def test_a_job_that_recurs_is_one_step_and_is_given_up_with_its_reason() -> None:
    engine, steps = Engine(), Steps(run="2 comparisons", park_job="failed")
    assert engine.story.run_job(steps, "drift") == "2 comparisons"
    assert steps.calls == [("run", "drift")]
    steps = Steps(run=Permanent("no such table"), park_job="failed")
    assert engine.story.run_job(steps, "drift") == "failed"
    assert steps.calls[-1] == ("park_job", "drift", "job", "Permanent: no such table")
