"""What the engine can fail with. The gateway maps these to Transient, Permanent or Rejected (gateway/errors.py)."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """What a library said, without its line breaks, and not all of a long story."""
    return " ".join(str(error).split())[:500]


class EngineError(Exception):
    """Root of everything that the engine raises on purpose."""


class InputRejected(EngineError):
    """The image is at fault: wrong number of channels, not finite, shape or spacing the model cannot take."""


class NotFinite(InputRejected):
    """The image or label map holds NaN or infinity."""


class DatasetInvalid(EngineError):
    """A training dataset, its fingerprint, plans or splits are incomplete or contradict each other."""


class DatasetBusy(EngineError):
    """Another process changes the dataset, or reads what would be changed; nothing was written."""


class WorkerDied(EngineError):
    """A worker process ended without a result, as a rule because memory ran out; fewer of them may succeed."""


class DiskTooSmall(EngineError):
    """What is to be written does not fit onto the disk; the message has both numbers, and nothing was written."""


class TrainingRefused(EngineError):
    """A training cannot be started or resumed as asked; nothing was changed."""


class TrainingDiverged(EngineError):
    """The loss of a training is no longer finite; the last checkpoint is from before."""


class BundleInvalid(EngineError):
    """A model bundle is incomplete, inconsistent or changed; it is not loaded."""


class ImportRefused(EngineError):
    """A result folder, zip or checkpoint is unsafe, unknown or inconsistent; nothing was imported."""


class ParityFailed(EngineError):
    """The exported network does not compute what the original computes; nothing was deployed."""


class MemoryExceeded(EngineError):
    """The estimated or measured peak does not fit into what is free; the message has both numbers."""


class BackendFailed(EngineError):
    """The runtime failed on a batch (device lost, out of memory); trying again may help."""


class PlanInvalid(EngineError):
    """An execution plan is damaged or of another release; it is not used."""
