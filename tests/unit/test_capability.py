from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

from gateway.delivery.capability import REFUSAL_HOLDS_FOR, Learned

_NOW = datetime(2026, 3, 1, tzinfo=UTC)
_ORDER = ("LABELMAP", "BINARY", "SC")


def test_nothing_known_starts_with_the_first_configured() -> None:
    assert Learned().choose(_ORDER, _NOW) == "LABELMAP"


def test_a_refusal_is_remembered_through_the_record() -> None:
    learned = Learned().learn("LABELMAP", "refused", "0x0122", _NOW)
    again = Learned.from_record(json.loads(json.dumps(learned.as_record())))
    assert again == learned
    assert again.choose(_ORDER, _NOW) == "BINARY"
    assert Learned.from_record(None) == Learned()


def test_a_refusal_is_forgotten_after_its_time_and_learned_anew() -> None:
    later = _NOW + REFUSAL_HOLDS_FOR
    learned = Learned().learn("LABELMAP", "refused", "0x0122", _NOW)
    assert learned.choose(_ORDER, later - timedelta(seconds=1)) == "BINARY"
    assert learned.choose(_ORDER, later) == "LABELMAP"
    assert learned.learn("LABELMAP", "refused", "0x0122", later).choose(_ORDER, later) == "BINARY"


def test_memory_alone_never_leaves_a_delivery_without_an_encoding() -> None:
    learned = Learned()
    for name in _ORDER:
        learned = learned.learn(name, "refused", "", _NOW)
    assert learned.choose(_ORDER, _NOW) == "LABELMAP"
    assert learned.choose(_ORDER, _NOW, refused=("LABELMAP",)) == "BINARY"
    assert learned.choose(_ORDER, _NOW, refused=_ORDER) is None


def test_the_same_lesson_keeps_its_time() -> None:
    learned = Learned().learn("BINARY", "accepted", "first", _NOW)
    assert learned.learn("BINARY", "accepted", "second", _NOW + timedelta(days=1)) is learned
