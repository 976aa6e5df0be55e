"""What the EMR side can fail with. The gateway maps these to Transient or Permanent (gateway/errors.py)."""

from __future__ import annotations


class EmrError(Exception):
    """Root of everything that the EMR client raises on purpose."""


class Unavailable(EmrError):
    """The server did not answer, or answered 429/5xx; trying again later may help."""


class Refused(EmrError):
    """The server refused the report for good (4xx); the message holds its OperationOutcome codes."""


class PatientNotResolved(EmrError):
    """None or more than one Patient has the configured identifier: the report is held (EMR-47)."""


class ReportInvalid(EmrError):
    """The content cannot be made into a valid report; the message names the field, never the patient."""


class CredentialsInvalid(EmrError):
    """The credentials for the EMR cannot be used: wrong kind of key, or they would travel unencrypted."""
