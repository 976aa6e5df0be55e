from __future__ import annotations

import pytest
from pynetdicom.status import STORAGE_SERVICE_CLASS_STATUS

from gateway.delivery.status import concerns_the_class, http_meaning, status_meaning

_CATEGORY = {
    "Success": {"stored"},
    "Warning": {"warning"},
    "Failure": {"failed", "doubtful", "refused"},
    "Cancel": {"failed"},
}


def test_every_storage_status_is_judged_in_its_category() -> None:
    for code, (category, _) in STORAGE_SERVICE_CLASS_STATUS.items():
        # A duplicate is no failure to the sender: the object is there.
        outcomes = {"warning"} if code == 0x0111 else _CATEGORY[category]
        assert status_meaning(code).outcome in outcomes, f"0x{code:04X}"


@pytest.mark.parametrize("code", [0xA700, 0xA701, 0xA7FF, 0x0213, 0x0124, 0xFE00])
def test_what_may_succeed_later_is_failed_not_refused(code: int) -> None:
    assert status_meaning(code).outcome == "failed"


def test_a_code_nobody_defined_is_never_a_success() -> None:
    assert {status_meaning(c).outcome for c in (0x0002, 0x7777, 0xD000, 0xFFFF, 0xFF00)} == {"doubtful"}


def test_the_text_has_the_code_as_dicom_writes_it() -> None:
    assert status_meaning(0xB006).text == "0xB006 elements discarded"


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(200, "stored"), (204, "stored"), (400, "refused"), (418, "refused"), (429, "failed"), (503, "failed")],
)
def test_http_statuses(code: int, outcome: str) -> None:
    assert http_meaning(code).outcome == outcome


def test_only_refusals_of_the_class_tell_of_the_next_object() -> None:
    assert concerns_the_class(None)
    assert concerns_the_class(0x0122)
    assert not concerns_the_class(0xA900)
    assert not concerns_the_class(0x0117)
