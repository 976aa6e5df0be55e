"""Prometheus metrics, read from the database and the spool at each scrape (ART-18).

Counting where the truth is keeps the numbers right across restarts and processes. No label holds patient data or a
UID; destinations, models, states and alarm kinds are the only labels. Studies, results and latencies are those of
patients: the gateway's own canaries are not among them.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from datetime import timedelta

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from storage.alarms import is_quiet, open_alarms
from storage.canary_records import CANARY_RULE, no_canary
from storage.database import Database
from storage.errors import DatabaseAway
from storage.records import (
    Delivery,
    DeliveryState,
    DestinationState,
    Executor,
    Instance,
    Refusal,
    Result,
    ResultState,
    Study,
    StudyState,
    utc_now,
)
from storage.spool import Spool

_LATENCY_WINDOW = timedelta(hours=24)
Metric = GaugeMetricFamily | CounterMetricFamily


class GatewayCollector(Collector):
    """All metrics of one gateway."""

    def __init__(self, database: Database, spool: Spool) -> None:
        self._database = database
        self._spool = spool

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("seggate_database_up", "1 when the database answered this scrape.")
        try:
            with self._database.reading() as session:
                found = [*_counts(session), *_ages(session), *_latencies(session)]
            up.add_metric([], 1)
        except DatabaseAway:
            found = []
            up.add_metric([], 0)
        yield up
        yield from found
        yield from self._space()
        yield from _gpu()

    def _space(self) -> Iterable[Metric]:
        free = GaugeMetricFamily("seggate_spool_free_bytes", "Free space of the file system that holds the spool.")
        free.add_metric([], self._spool.free_bytes())
        yield free
        waiting = GaugeMetricFamily("seggate_spool_incoming", "Objects and events acknowledged but not yet indexed.")
        waiting.add_metric([], len(self._spool.incoming()))
        yield waiting


def exposition(database: Database, spool: Spool) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(GatewayCollector(database, spool))
    return generate_latest(registry)


def _counts(session: Session) -> Iterable[Metric]:
    studies = GaugeMetricFamily("seggate_studies", "Studies by state.", labels=["state"])
    by_state = session.execute(
        select(Study.state, func.count()).where(no_canary(Study.study_instance_uid)).group_by(Study.state)
    )
    known = {state: count for state, count in by_state}
    for study_state in StudyState:
        studies.add_metric([study_state], known.get(study_state, 0))
    yield studies

    objects = CounterMetricFamily("seggate_objects", "Acknowledged objects by what became of them.", labels=["state"])
    for state, count in session.execute(select(Instance.state, func.count()).group_by(Instance.state)):
        objects.add_metric([state], count)
    yield objects

    refusals = CounterMetricFamily("seggate_refusals", "Refused associations and objects.", labels=["kind"])
    for kind, count in session.execute(select(Refusal.kind, func.sum(Refusal.count)).group_by(Refusal.kind)):
        refusals.add_metric([kind], count)
    yield refusals

    results = CounterMetricFamily(
        "seggate_results", "Results by model, state and QA verdict.", labels=["model", "version", "state", "verdict"]
    )
    rows = session.execute(
        select(Result.model_name, Result.model_version, Result.state, Result.verdict, func.count())
        .where(Result.rule != CANARY_RULE)
        .group_by(Result.model_name, Result.model_version, Result.state, Result.verdict)
    )
    for name, version, state, verdict, count in rows:
        results.add_metric([name, version, state, verdict or "none"], count)
    yield results

    deliveries = GaugeMetricFamily("seggate_deliveries", "Deliveries by state.", labels=["destination", "state"])
    undelivered = session.execute(
        select(Delivery.destination, Delivery.state, func.count()).group_by(Delivery.destination, Delivery.state)
    )
    for destination, state, count in undelivered:
        deliveries.add_metric([destination, state], count)
    yield deliveries

    down = GaugeMetricFamily(
        "seggate_destination_down", "1 while a destination does not answer.", labels=["destination"]
    )
    for name, circuit in session.execute(select(DestinationState.name, DestinationState.circuit)):
        down.add_metric([name], 1 if circuit == "open" else 0)
    yield down

    alarms = GaugeMetricFamily(
        "seggate_alarms_open", "Open alarms by kind that nobody has acknowledged or snoozed.", labels=["kind"]
    )
    now = utc_now()
    kinds = [alarm.kind for alarm in open_alarms(session) if not is_quiet(alarm, now)]
    for kind in sorted(set(kinds)):
        alarms.add_metric([kind], kinds.count(kind))
    yield alarms


def _ages(session: Session) -> Iterable[Metric]:
    now = utc_now()
    ages = GaugeMetricFamily("seggate_oldest_waiting_seconds", "Age of the oldest work by stage.", labels=["stage"])
    receiving = session.scalar(select(func.min(Study.last_received_at)).where(Study.state == StudyState.RECEIVING))
    pending = session.scalar(select(func.min(Result.created_at)).where(Result.state == ResultState.PENDING))
    undelivered = session.scalar(
        select(func.min(Delivery.queued_at)).where(Delivery.state.in_([DeliveryState.QUEUED, DeliveryState.SENT]))
    )
    for stage, since in (("assembly", receiving), ("inference", pending), ("delivery", undelivered)):
        ages.add_metric([stage], max(0.0, (now - since).total_seconds()) if since else 0.0)
    yield ages

    beats = GaugeMetricFamily("seggate_executor_silent_seconds", "Time since an executor's last beat.", labels=["role"])
    rows = session.execute(
        select(Executor.role, func.max(Executor.beat_at)).where(Executor.stopped_at.is_(None)).group_by(Executor.role)
    )
    for role, beat in rows:
        beats.add_metric([role], max(0.0, (now - beat).total_seconds()))
    yield beats


def _latencies(session: Session) -> Iterable[Metric]:
    """Seconds from the last object of a study to its finished result, over the last day."""
    rows = session.execute(
        select(Result.model_name, Result.finished_at, Study.last_received_at)
        .join(Study, Study.study_instance_uid == Result.study_instance_uid)
        .where(
            Result.state == ResultState.RELEASED,
            Result.finished_at >= utc_now() - _LATENCY_WINDOW,
            Result.rule != CANARY_RULE,
        )
    )
    seconds: dict[str, list[float]] = {}
    for model, finished, received in rows:
        if finished is not None and received is not None and finished >= received:
            seconds.setdefault(model, []).append((finished - received).total_seconds())
    latency = GaugeMetricFamily(
        "seggate_case_seconds",
        "Seconds from a study's last object to its finished result, last 24 hours.",
        labels=["model", "quantile"],
    )
    for model, values in seconds.items():
        ordered = sorted(values)
        for quantile in (0.5, 0.95):
            latency.add_metric([model, f"{quantile:g}"], ordered[min(len(ordered) - 1, int(quantile * len(ordered)))])
    yield latency


def _gpu() -> Iterable[Metric]:
    """Utilisation and memory of NVIDIA GPUs, where the driver's own tool answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return
    query = "--query-gpu=index,utilization.gpu,memory.used,memory.total"
    try:
        answer = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return
    use = GaugeMetricFamily("seggate_gpu_utilisation_ratio", "GPU utilisation, 0 to 1.", labels=["gpu"])
    memory = GaugeMetricFamily("seggate_gpu_memory_used_ratio", "GPU memory in use, 0 to 1.", labels=["gpu"])
    for line in answer.stdout.splitlines():
        fields = [f.strip() for f in line.split(",")]
        if len(fields) == 4 and all(f.replace(".", "", 1).isdigit() for f in fields):
            use.add_metric([fields[0]], float(fields[1]) / 100)
            memory.add_metric([fields[0]], float(fields[2]) / max(1.0, float(fields[3])))
    yield use
    yield memory
