"""Transient, Permanent, Rejected: what the workflow does with a failure, and the table that decides it.

Each package raises its own errors; this is the one place that says what they mean for a study.
"""

from __future__ import annotations

import sys

import emr.errors
import engine.errors
import gateway.intake.errors
import storage.errors


class GatewayError(Exception):
    """Root of the gateway's own errors."""


class Transient(GatewayError):
    """The other side or a resource is away; the same step may succeed later."""


class Permanent(GatewayError):
    """Will fail again until a person changes something; the work is parked and listed."""


class Rejected(GatewayError):
    """The input is at fault; the message names the attribute or file."""


_MEANING: tuple[tuple[type[BaseException], type[GatewayError]], ...] = (
    (gateway.intake.errors.IntakeRejected, Rejected),
    (engine.errors.InputRejected, Rejected),
    (engine.errors.DatasetInvalid, Rejected),
    (engine.errors.DatasetBusy, Transient),
    (engine.errors.WorkerDied, Transient),
    (engine.errors.DiskTooSmall, Permanent),
    (engine.errors.TrainingRefused, Rejected),
    (engine.errors.TrainingDiverged, Permanent),
    (engine.errors.BundleInvalid, Permanent),
    (engine.errors.ImportRefused, Rejected),
    (engine.errors.ParityFailed, Permanent),
    (engine.errors.MemoryExceeded, Permanent),
    (engine.errors.BackendFailed, Transient),
    (engine.errors.PlanInvalid, Permanent),
    (emr.errors.TryLater, Transient),
    (emr.errors.Refused, Permanent),
    (emr.errors.PatientNotResolved, Permanent),
    (storage.errors.SpoolFull, Transient),
    (storage.errors.SpoolUnsafe, Transient),
    (storage.errors.DatabaseAway, Transient),
    (storage.errors.ObjectMissing, Permanent),
    (storage.errors.ObjectChanged, Permanent),
    (storage.errors.LedgerBroken, Permanent),
    (storage.errors.ModelMissing, Permanent),
    (storage.errors.ModelChanged, Permanent),
    (ConnectionError, Transient),
    (TimeoutError, Transient),
)


def _known() -> tuple[tuple[type[BaseException], type[GatewayError]], ...]:
    # An error of a module that nobody has loaded cannot be here, and loading it takes time that commands on files save.
    queries = sys.modules.get("sqlalchemy.exc")
    if queries is None:
        return _MEANING
    return (*_MEANING, (queries.NoResultFound, Rejected))  # the study was deleted while a step of it was at work


def meaning(error: BaseException) -> type[GatewayError]:
    """Transient, Permanent or Rejected for any exception; unknown ones are Permanent (parked, never looped)."""
    for own in (Transient, Permanent, Rejected):
        if isinstance(error, own):
            return own
    for known, verdict in _known():
        if isinstance(error, known):
            return verdict
    return Permanent


def is_foreseen(error: BaseException) -> bool:
    """Whether the table knows the error: its message then says all, and a traceback nothing."""
    return isinstance(error, (Transient, Permanent, Rejected, *(known for known, _ in _known())))


def is_of_the_machine(error: BaseException) -> bool:
    """Whether disk or database is what fails: all work waits until they are back, and none of it is parked for that."""
    return isinstance(error, storage.errors.SpoolFull | storage.errors.SpoolUnsafe | storage.errors.DatabaseAway)
