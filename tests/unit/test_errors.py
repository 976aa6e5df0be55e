"""What every error means for a study: known to the table, or parked on purpose."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest

import emr.errors
import engine.errors
import gateway.intake.errors
import storage.errors
from gateway import errors
from gateway.errors import Permanent, Rejected, Transient, meaning

PACKAGES = (engine.errors, emr.errors, storage.errors, gateway.intake.errors)
ROOTS = {"EngineError", "EmrError", "StorageError", "IntakeError"}
# Not in the table, hence Permanent: trying again changes nothing, a person must.
PARKED_ON_PURPOSE = {"ReportInvalid"}
WHOLE_MEANING = {
    "BackendFailed": Transient,
    "Unavailable": Transient,
    "TryLater": Transient,
    "Misconfigured": Transient,
    "CredentialsInvalid": Transient,
    "SpoolFull": Transient,
    "SpoolUnsafe": Transient,
    "DatabaseAway": Transient,
    "InputRejected": Rejected,
    "NotFinite": Rejected,
    "DatasetInvalid": Rejected,
    "TrainingRefused": Rejected,
    "DatasetBusy": Transient,
    "WorkerDied": Transient,
    "ImportRefused": Rejected,
    "IntakeRejected": Rejected,
}


def own_errors(module: ModuleType) -> list[type[Exception]]:
    return [
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Exception) and kind.__module__ == module.__name__ and kind.__name__ not in ROOTS
    ]


@pytest.mark.parametrize("kind", [k for m in PACKAGES for k in own_errors(m)], ids=lambda k: k.__name__)
def test_every_error_has_the_meaning_that_was_decided(kind: type[Exception]) -> None:
    assert meaning(kind("what went wrong")) is WHOLE_MEANING.get(kind.__name__, Permanent)
    in_table = any(issubclass(kind, known) for known, _ in errors._MEANING)
    assert in_table != (kind.__name__ in PARKED_ON_PURPOSE), "decide: add it to the table, or to PARKED_ON_PURPOSE"


def test_every_package_names_its_root() -> None:
    for module in PACKAGES:
        assert [n for n, _ in inspect.getmembers(module, inspect.isclass) if n in ROOTS]


def test_own_verdicts_stand_and_their_subclasses_with_them() -> None:
    class Away(Transient):
        pass

    assert meaning(Away()) is Transient
    assert meaning(Rejected()) is Rejected
    assert meaning(Permanent()) is Permanent


@pytest.mark.parametrize("error", [ConnectionResetError(), TimeoutError(), ConnectionRefusedError()])
def test_a_broken_connection_is_transient(error: Exception) -> None:
    assert meaning(error) is Transient


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyError("x"), OSError(), MemoryError()])
def test_what_nobody_foresaw_is_parked_and_never_looped(error: Exception) -> None:
    assert meaning(error) is Permanent
