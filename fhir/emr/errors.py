"""What the EMR side can fail with. The gateway maps these to Transient or Permanent (gateway/errors.py)."""

from __future__ import annotations


class EmrError(Exception):
    """Root of everything that the EMR client raises on purpose."""


class TryLater(EmrError):
    """Nothing is wrong with the report; the same may succeed later.

    `whole`: the server as a whole lets no report through. False where it may be just this one, because the server had
    answered the Patient search.
    """

    def __init__(self, message: str, *, whole: bool = True) -> None:
        super().__init__(message)
        self.whole = whole


class Unavailable(TryLater):
    """The server did not answer, or answered 429/5xx; trying again later may help."""


class Misconfigured(TryLater):
    """The server answers, but something is not set up right, there or here: credentials, rights, address, FHIR version.

    Mended by an administrator; the message says what. Until then it is tried again.
    """


class CredentialsInvalid(Misconfigured):
    """The credentials for the EMR cannot be used: wrong kind of key, or they would travel unencrypted."""


class Refused(EmrError):
    """The server refused the content of the report for good; the message holds its OperationOutcome codes."""


class PatientNotResolved(EmrError):
    """None or more than one Patient has the configured identifier: the report is held (EMR-47)."""


class ReportInvalid(EmrError):
    """The content cannot be made into a valid report; the message names the field, never the patient."""
