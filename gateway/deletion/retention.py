"""Retention that cannot bite (OPS-57): which studies go by themselves, the longest delivered first.

For its age a study goes `delivered_days` after its delivery (or `unmatched_days` after its last object). For space,
where less is free than `start_below_mb`, studies go one by one, until `stop_at_mb` is free or none is left that may go;
then an alarm says why the disk stays full. Never within `keep_days`, and never with a reason to stay
(gateway/deletion/reasons_to_stay.py), which is looked at again behind the study's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import structlog

from gateway.deletion.deletions import Deletions, StudyStays
from gateway.deletion.reasons_to_stay import Judged, Reason, judge_studies
from gateway.settings import RetentionSettings, Settings
from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.models import SHADOW, ModelRegistry
from storage.records import StudyState, utc_now
from storage.spool import Spool

ALARM = "retention-short-of-space"
_SUBJECT = "gateway"
_MIB = 1 << 20
_log = structlog.get_logger(__name__)

AGE, SPACE = "age", "space"


@dataclass(frozen=True, kw_only=True)
class Going:
    """A study that goes: for its age, or for space."""

    study: Judged
    because: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What would go, in this order, and what stays with every reason. `free_bytes` now; `short_bytes` is what would
    still be missing after all of it."""

    free_bytes: int
    going: tuple[Going, ...]
    staying: tuple[Judged, ...]
    short_bytes: int

    @property
    def going_bytes(self) -> int:
        return sum(one.study.size_bytes for one in self.going)


@dataclass(kw_only=True)
class _Done:
    studies: int = 0
    size_bytes: int = 0
    stayed: list[str] = field(default_factory=list)


class Retention:
    """`plan` is a dry run, `run` the job. `shadows` says which versions are being tried, by model and version."""

    def __init__(
        self,
        *,
        database: Database,
        spool: Spool,
        settings: Settings,
        deletions: Deletions,
        shadows: Callable[[], Collection[tuple[str, str]]] = frozenset,
        clock: Callable[[], datetime] = utc_now,
        most_s: float | None = None,
    ) -> None:
        """`most_s`: a run begins no deletion after so long; other jobs wait for its worker."""
        self._most_s = most_s
        self._database = database
        self._spool = spool
        self._settings = settings
        self._policy = settings.gateway.retention
        self._deletions = deletions
        self._shadows = shadows
        self._clock = clock

    def plan(self) -> Plan:
        """Nothing is changed. Raises DatabaseAway, SpoolUnsafe."""
        free_bytes, judged = self._spool.free_bytes(), self._judged()
        going = self._for_age(judged)
        aged = {one.study.study_instance_uid for one in going}
        left = [study for study in judged if study.study_instance_uid not in aged]
        wanted = self._wanted_bytes(free_bytes)
        missing = wanted - sum(one.study.size_bytes for one in going)
        staying = []
        for study in left:
            if wanted and missing > 0 and not study.reasons:
                going.append(Going(study=study, because=SPACE))
                missing -= study.size_bytes
            else:
                staying.append(study if study.reasons else _with(study, self._not_yet(wanted)))
        return Plan(
            free_bytes=free_bytes,
            going=tuple(going),
            staying=tuple(staying),
            short_bytes=max(0, missing) if wanted else 0,
        )

    def run(self) -> str:
        """The job: finish what was cut short, then delete what the policy says; a sentence on it. Raises DatabaseAway,
        SpoolUnsafe."""
        began = time.monotonic()
        self._deletions.finish_all()
        if not self._policy.deletes:
            self._tell(0)
            return "[retention] deletes nothing: delivered_days, unmatched_days and start_below_mb are 0"
        judged, shadows, done = self._judged(), self._shadows(), _Done()
        aged = self._for_age(judged)
        for one in aged:
            if self._is_long_enough(began):
                break
            self._retire(one, shadows, done)
        gone = {one.study.study_instance_uid for one in aged}
        left = [study for study in judged if study.study_instance_uid not in gone and not study.reasons]
        wanted = self._wanted_bytes(self._spool.free_bytes())
        target = self._policy.until_mb * _MIB
        for study in left if wanted else ():
            if self._spool.free_bytes() >= target or self._is_long_enough(began):
                break
            self._retire(Going(study=study, because=SPACE), shadows, done)
        free_bytes, is_cut = self._spool.free_bytes(), self._is_long_enough(began)
        self._tell(0 if is_cut else max(0, self._policy.start_below_mb * _MIB - free_bytes))
        said = f"{done.studies} studies deleted, {done.size_bytes // _MIB} MB; {free_bytes // _MIB} MB are free"
        said += f"; {len(done.stayed)} stayed after all" if done.stayed else ""
        return said + ("; the next run goes on" if is_cut else "")

    def _is_long_enough(self, began: float) -> bool:
        return self._most_s is not None and time.monotonic() - began >= self._most_s

    def _retire(self, one: Going, shadows: Collection[tuple[str, str]], done: _Done) -> None:
        reason = self._reason(one)
        try:
            deleted = self._deletions.retire(one.study, reason=reason, in_shadow=shadows)
        except (StudyStays, KeyError) as error:  # something has come up, or it is gone already
            _log.info("a study stays after all", reason=type(error).__name__)
            done.stayed.append(one.study.study_instance_uid)
            return
        done.studies, done.size_bytes = done.studies + 1, done.size_bytes + deleted.size_bytes

    def _reason(self, one: Going) -> str:
        if one.because == SPACE:
            return f"less than {self._policy.start_below_mb} MB were free"
        days = self._policy.delivered_days if one.study.state == StudyState.VERIFIED else self._policy.unmatched_days
        return f"done with for more than {days} days"

    def _judged(self) -> list[Judged]:
        """Every study, with what `keep_days` says among its reasons."""
        gateway, now = self._settings.gateway, self._clock()
        shadows = self._shadows()
        with self._database.reading() as session:
            found = judge_studies(
                session, self._policy, now=now, late_window_s=gateway.late_window_s, in_shadow=shadows
            )
        kept = now - timedelta(days=self._policy.keep_days)
        words = Reason(kind="keep-days", words=f"done with for less than {self._policy.keep_days} days (keep_days)")
        return [study if study.done_at <= kept else _with(study, words) for study in found]

    def _for_age(self, judged: Sequence[Judged]) -> list[Going]:
        now = self._clock()
        days = {StudyState.VERIFIED: self._policy.delivered_days, StudyState.UNMATCHED: self._policy.unmatched_days}
        return [
            Going(study=study, because=AGE)
            for study in judged
            if not study.reasons
            and (limit := days.get(StudyState(study.state), 0))
            and study.done_at <= now - timedelta(days=limit)
        ]

    def _wanted_bytes(self, free_bytes: int) -> int:
        """How much space is to be made now; 0 where enough is free."""
        if not self._policy.start_below_mb or free_bytes >= self._policy.start_below_mb * _MIB:
            return 0
        return self._policy.until_mb * _MIB - free_bytes

    def _not_yet(self, wanted: int) -> Reason:
        if not self._policy.deletes:
            return Reason(kind="off", words="[retention] deletes nothing")
        return Reason(kind="not-yet", words="not old enough" + ("; enough space is made by others" if wanted else ""))

    def _tell(self, short_bytes: int) -> None:
        """The alarm, while less than `start_below_mb` is free and nothing may go."""
        with self._database.session() as session:
            if not short_bytes:
                clear_alarms(session, kind=ALARM, subject=_SUBJECT, by="retention")
                return
            message = (
                f"{short_bytes // _MIB} MB are missing to retention.start_below_mb, and no other study may be deleted; "
                "`seggate retention --dry-run` says why each stays"
            )
            raise_alarm(session, kind=ALARM, subject=_SUBJECT, message=message)


def versions_in_shadow(registry: ModelRegistry) -> frozenset[tuple[str, str]]:
    """Model and version of all that run in shadow now."""
    return frozenset((model.name, model.semver) for model in registry.all() if SHADOW in model.aliases)


def policy_in_words(policy: RetentionSettings) -> str:
    """For a person, in a line."""
    if not policy.deletes:
        return "[retention] deletes nothing by itself"
    parts = []
    if policy.delivered_days:
        parts.append(f"delivered for {policy.delivered_days} days")
    if policy.unmatched_days:
        parts.append(f"unmatched for {policy.unmatched_days} days")
    if policy.start_below_mb:
        parts.append(f"below {policy.start_below_mb} MB free, until {policy.until_mb} MB are")
    return f"{'; '.join(parts)}; nothing within {policy.keep_days} days"


def _with(study: Judged, reason: Reason) -> Judged:
    return Judged(
        study_instance_uid=study.study_instance_uid,
        state=study.state,
        done_at=study.done_at,
        size_bytes=study.size_bytes,
        reasons=(*study.reasons, reason),
    )
