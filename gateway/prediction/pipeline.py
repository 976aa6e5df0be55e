"""Reading, predicting and writing of cases overlap: while the networks run, the next case is read and the last written.

Memory is bounded: so many cases are read ahead as were asked for (one), and only where the image fits beside what runs;
so many results wait to be written (one).
"""

from __future__ import annotations

import errno
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import EngineError, MemoryExceeded
from engine.manifest import Contract
from engine.memory import available_bytes
from engine.volume import Geometry, Volume
from gateway.errors import GatewayError
from gateway.prediction.cases import Case
from gateway.prediction.runner import Predicted, Runner

CASE_ERRORS: tuple[type[Exception], ...] = (EngineError, GatewayError, OSError, MemoryError)
"""What one case may fail with; the others go on."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


class PredictionStopped(Exception):
    """Leaves the network between two windows: a signal asked for it."""


@dataclass(frozen=True, kw_only=True)
class CaseDone:
    """`seconds` by stage: read, preprocess, network, export, statistics, write. `error`: None for what was written."""

    case: Case
    seconds: dict[str, float] = field(default_factory=dict)
    volumes_ml: dict[str, float] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    doubts: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Read:
    volume: Volume
    doubts: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Waiting:
    case: Case
    image_bytes: int
    future: Future[_Read]


Report = Callable[[Case, float], None]
Write = Callable[[Case, Predicted], tuple[Path, ...]]


class Pipeline:
    """One call's work. `write` is called in a thread of its own; `report` (case, share done) between windows; `stop`
    says that it is to end, which the case in the networks does not survive."""

    def __init__(
        self,
        runner: Runner,
        contract: Contract,
        write: Write,
        *,
        channels: int,
        ahead: int,
        writers: int,
        report: Report,
        stop: Callable[[], bool],
    ) -> None:
        self._runner = runner
        self._contract = contract
        self._write = write
        self._channels = channels
        self._ahead = ahead
        self._writers = writers
        self._report = report
        self._stop = stop

    def run(self, cases: Sequence[Case]) -> Iterator[CaseDone]:
        """Each case as it is done, in their order. Raises PredictionStopped, and OSError where the disk is full: then
        nothing more can be written. What was being written is finished before."""
        remaining = deque(cases)
        reading: deque[_Waiting] = deque()
        writing: deque[Future[CaseDone]] = deque()
        with ThreadPoolExecutor(self._ahead) as readers, ThreadPoolExecutor(self._writers) as writers:
            try:
                while reading or remaining:
                    if not reading:
                        case = remaining.popleft()
                        reading.append(
                            _Waiting(case=case, image_bytes=0, future=readers.submit(self._read, case, True))
                        )
                    current = reading.popleft()
                    try:
                        read = current.future.result()
                    except CASE_ERRORS as error:
                        while writing:
                            yield writing.popleft().result()
                        yield CaseDone(case=current.case, error=_text(error))
                        continue
                    self._read_ahead(read.volume.geometry, remaining, reading, readers)
                    done = self._predict(current.case, read)
                    del read
                    while len(writing) >= self._writers or (writing and writing[0].done()):
                        yield writing.popleft().result()
                    if isinstance(done, CaseDone):
                        while writing:
                            yield writing.popleft().result()
                        yield done
                    else:
                        writing.append(writers.submit(done))
                    del done
                while writing:
                    yield writing.popleft().result()
            except BaseException:
                for waiting in reading:
                    waiting.future.cancel()
                raise

    def _read(self, case: Case, alone: bool) -> _Read:
        """`alone`: nothing else runs, so what is free now is what there is. A case read ahead is asked again by its
        prediction."""
        began = time.monotonic()
        geometry = case.geometry()
        doubts = case.doubts(self._contract)
        if alone:
            self._runner.check_memory(geometry)
        return _Read(volume=case.read(), doubts=tuple(doubts), seconds=time.monotonic() - began)

    def _read_ahead(
        self, running: Geometry, remaining: deque[Case], reading: deque[_Waiting], readers: ThreadPoolExecutor
    ) -> None:
        """Begins to read the next cases, where the image of each fits beside the prediction that is about to run."""
        while remaining and len(reading) < self._ahead:
            case = remaining[0]
            try:
                size = 4 * self._channels * math.prod(case.geometry().shape)
                held = sum(waiting.image_bytes for waiting in reading if not waiting.future.done())
                self._runner.check_memory(running, budget_bytes=max(0, available_bytes() - held - size))
            except MemoryExceeded:
                return
            except CASE_ERRORS:
                size = 0  # reading it says so, in its turn
            remaining.popleft()
            reading.append(_Waiting(case=case, image_bytes=size, future=readers.submit(self._read, case, False)))

    def _predict(self, case: Case, read: _Read) -> CaseDone | Callable[[], CaseDone]:
        """The case's failure, or what is to be done in the writer's thread."""

        def progress(share: float) -> None:
            if self._stop():
                raise PredictionStopped
            self._report(case, share)

        try:
            progress(0.0)
            predicted = self._runner.predict(read.volume, progress)
        except CASE_ERRORS as error:
            return CaseDone(case=case, doubts=read.doubts, error=_text(error))
        seconds, doubts = {"read": read.seconds, **predicted.seconds}, read.doubts

        def write() -> CaseDone:
            began = time.monotonic()
            try:
                files = self._write(case, predicted)
            except CASE_ERRORS as error:
                if isinstance(error, OSError) and error.errno in _FULL:
                    raise
                return CaseDone(case=case, doubts=doubts, error=_text(error))
            return CaseDone(
                case=case,
                seconds={**seconds, "write": time.monotonic() - began},
                volumes_ml=predicted.volumes_ml,
                files=files,
                doubts=doubts,
            )

        return write


def _text(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "memory ran out while it was read or predicted"
    if isinstance(error, OSError) and error.strerror:
        return f"{Path(str(error.filename)).name}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
