from __future__ import annotations

from datetime import UTC, datetime, timedelta

from gateway.delivery.retry import Circuit, backoff_s

_LIMITS = {"first_retry_s": 5.0, "max_retry_s": 300.0}
_START = datetime(2026, 3, 1, tzinfo=UTC)


def test_steps_double_up_to_the_cap_and_jitter_takes_at_most_half() -> None:
    for failures, step in [(1, 5), (2, 10), (3, 20), (6, 160), (7, 300), (8, 300), (10_000, 300)]:
        wait = backoff_s(failures, **_LIMITS, key="d1")
        assert step / 2 <= wait <= step


def test_the_same_delivery_and_attempt_wait_the_same_and_others_differ() -> None:
    assert backoff_s(3, **_LIMITS, key="d1") == backoff_s(3, **_LIMITS, key="d1")
    assert len({backoff_s(3, **_LIMITS, key=f"d{n}") for n in range(50)}) == 50


def test_a_closed_circuit_lets_everybody_through() -> None:
    assert Circuit(is_open=False, since=_START, failures=0).wait_s(_START, **_LIMITS) == 0


def test_a_failure_opens_the_circuit_and_an_answer_closes_it() -> None:
    opened = Circuit(is_open=False, since=_START, failures=0).failed(_START)
    assert opened == Circuit(is_open=True, since=_START, failures=1)
    assert opened.wait_s(_START, **_LIMITS) == 5
    later = _START + timedelta(seconds=5)
    assert opened.wait_s(later, **_LIMITS) == 0
    assert opened.succeeded(later) == Circuit(is_open=False, since=later, failures=0)


def test_a_claimed_probe_makes_the_others_wait_for_the_next() -> None:
    due = _START + timedelta(seconds=5)
    claimed = Circuit(is_open=True, since=_START, failures=1).claim(due, **_LIMITS)
    assert claimed.failures == 2
    assert claimed.wait_s(due, **_LIMITS) == 10
    assert claimed.failed(due) == claimed


def test_probes_that_were_missed_are_skipped_not_made_up_for() -> None:
    much_later = _START + timedelta(hours=12)
    claimed = Circuit(is_open=True, since=_START, failures=1).claim(much_later, **_LIMITS)
    assert 0 < claimed.wait_s(much_later, **_LIMITS) <= 300


def test_twelve_hours_of_outage_cost_one_probe_per_capped_step() -> None:
    """QUE-29: however many deliveries wait."""
    circuit, now, probes = Circuit(is_open=True, since=_START, failures=1), _START, 0
    while now < _START + timedelta(hours=12):
        now += timedelta(seconds=circuit.wait_s(now, **_LIMITS))
        circuit, probes = circuit.claim(now, **_LIMITS), probes + 1
    assert 140 <= probes <= 152  # 12 h / 300 s, and the first short steps


def test_a_clock_set_back_does_not_stop_the_probes() -> None:
    circuit = Circuit(is_open=True, since=_START, failures=100)
    for earlier in (_START - timedelta(days=365), _START + timedelta(hours=1)):
        assert circuit.wait_s(earlier, **_LIMITS) <= _LIMITS["max_retry_s"]
        righted = circuit.righted(earlier, **_LIMITS)
        assert righted == Circuit(is_open=True, since=earlier, failures=1)
        assert righted.wait_s(earlier + timedelta(seconds=5), **_LIMITS) == 0


def test_a_clock_that_is_right_changes_nothing() -> None:
    circuit = Circuit(is_open=True, since=_START, failures=4)
    assert circuit.righted(_START + timedelta(seconds=40), **_LIMITS) == circuit
