"""The state of a study from its results and deliveries: the worst news first."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gateway.study_state import derived
from storage.records import Delivery, DeliveryState, Result, ResultState, StudyState


def result(state: ResultState, reason: str | None = None) -> Result:
    return Result(state=state, state_reason=reason)


def delivery(state: DeliveryState, destination: str = "pacs", reason: str | None = None) -> Delivery:
    return Delivery(state=state, destination=destination, state_reason=reason)


RELEASED, VERIFIED = result(ResultState.RELEASED), delivery(DeliveryState.VERIFIED)


@pytest.mark.parametrize(
    ("results", "deliveries", "state", "reason"),
    [
        pytest.param([RELEASED], [VERIFIED], StudyState.VERIFIED, None, id="everything arrived"),
        pytest.param([result(ResultState.PENDING)], [], StudyState.PROCESSING, None, id="a model is at work"),
        pytest.param(
            [RELEASED, result(ResultState.PENDING)], [VERIFIED], StudyState.PROCESSING, None, id="one of two is at work"
        ),
        pytest.param([RELEASED], [delivery(DeliveryState.QUEUED)], StudyState.DELIVERING, None, id="on its queue"),
        pytest.param([RELEASED], [VERIFIED, delivery(DeliveryState.SENT)], StudyState.DELIVERING, None, id="sent"),
        pytest.param(
            [RELEASED, RELEASED],
            [
                VERIFIED,
                delivery(DeliveryState.QUEUED, "emr", "no Patient has the identifier"),
                delivery(DeliveryState.QUEUED, "emr", "no Patient has the identifier"),
                delivery(DeliveryState.SENT, "archive", "no answer"),
                delivery(DeliveryState.QUEUED, "vna"),
            ],
            StudyState.DELIVERING,
            "delivery to archive: no answer; delivery to emr: no Patient has the identifier",
            id="what is waited for is said once",
        ),
        pytest.param(
            [result(ResultState.HELD, "volume"), RELEASED],
            [VERIFIED],
            StudyState.HELD,
            "volume",
            id="one of two is held",
        ),
        pytest.param(
            [result(ResultState.HELD), result(ResultState.FAILED, "infer: no memory")],
            [],
            StudyState.FAILED,
            "infer: no memory",
            id="failed is worse than held",
        ),
        pytest.param(
            [RELEASED],
            [VERIFIED, delivery(DeliveryState.PARKED, "emr", "no patient")],
            StudyState.FAILED,
            "delivery to emr: no patient",
            id="a parked delivery",
        ),
        pytest.param(
            [result(ResultState.FAILED, "infer"), result(ResultState.PENDING)],
            [],
            StudyState.FAILED,
            "infer",
            id="failed is said while another is at work",
        ),
        pytest.param(
            [result(ResultState.NOT_RUN, "spacing 5 mm"), result(ResultState.NOT_RUN, "no slices")],
            [],
            StudyState.UNMATCHED,
            "spacing 5 mm; no slices",
            id="no model could run",
        ),
        pytest.param(
            [result(ResultState.NOT_RUN, "spacing 5 mm"), RELEASED],
            [VERIFIED],
            StudyState.VERIFIED,
            None,
            id="one ran, one could not",
        ),
        pytest.param(
            [RELEASED],
            [VERIFIED, delivery(DeliveryState.STORED, "b"), delivery(DeliveryState.STORED, "a")],
            StudyState.VERIFIED,
            "stored, cannot be queried: a, b",
            id="a destination that cannot be queried is said",
        ),
        pytest.param(
            [RELEASED],
            [VERIFIED, delivery(DeliveryState.WITHHELD)],
            StudyState.VERIFIED,
            None,
            id="withheld on purpose",
        ),
        pytest.param(
            [RELEASED],
            [],
            StudyState.HELD,
            "nobody to send it to: destinations.toml names no destination",
            id="nobody to send it to",
        ),
        pytest.param(
            [RELEASED],
            [delivery(DeliveryState.WITHHELD, "pacs", "a person said so")],
            StudyState.HELD,
            "delivery to pacs is withheld: a person said so",
            id="everything withheld",
        ),
        pytest.param(
            [RELEASED],
            [VERIFIED, delivery(DeliveryState.WITHHELD, "emr", "the study is quarantined: two patients")],
            StudyState.HELD,
            "delivery to emr: the study is quarantined: two patients",
            id="withheld because of a quarantine",
        ),
    ],
)
def test_the_state_of_a_study(
    results: Sequence[Result], deliveries: Sequence[Delivery], state: StudyState, reason: str | None
) -> None:
    assert derived(results, deliveries) == (state, reason)
    assert derived(results[::-1], deliveries[::-1])[0] == state
