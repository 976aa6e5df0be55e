"""The composition root: the one place where the parts are plugged together, one function per process.

`python -m gateway.role` calls these; nothing else does. Each makes its own connections and closes them at the end.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from importlib.util import find_spec

import structlog
from pydicom.dataset import Dataset

from emr.authorization import Authorization, Basic, NoAuthorization, SmartBackendServices, StaticToken
from emr.client import EmrClient, EmrEndpoint
from emr.errors import CredentialsInvalid
from emr.exchange import open_http
from gateway import durable
from gateway.deletion.deletions import Deletions
from gateway.deletion.retention import Retention, versions_in_shadow
from gateway.delivery.contact import forget_removed
from gateway.delivery.destination import Destination
from gateway.delivery.dicomweb import DicomWebPacs
from gateway.delivery.dimse import DimsePacs
from gateway.delivery.dispatch import Dispatch, awaited_destinations
from gateway.delivery.emr_connection import Emr, EmrConnection
from gateway.delivery.orthanc import OrthancPacs
from gateway.delivery.release import Release
from gateway.delivery.reported import ReportedObjects
from gateway.delivery.reporting import Reporting
from gateway.destination_settings import FhirDestination
from gateway.device_share import DeviceShare
from gateway.disk_space import ReserveWatch
from gateway.due_work import CANARY_CHECK, DELETION, enqueue_version
from gateway.durable import INFERENCE, JOBS, SHADOW, STUDIES, TRAINING, URGENT_INFERENCE, Enqueuer, delivery_queue
from gateway.heartbeat import Heartbeat, executor_id
from gateway.intake.assembly import Assembly
from gateway.intake.expected_count import ExpectedCounts
from gateway.intake.header import read_header
from gateway.intake.index_mark import IndexMark
from gateway.intake.routes_file import RoutesFile
from gateway.intake.routing_rules import RulesInvalid
from gateway.learning.candidates import consider_promotion
from gateway.learning.gate import check_at_startup
from gateway.learning.policy import LearningPolicy
from gateway.learning.registry_check import check_registry
from gateway.learning.rollback import Withdrawal
from gateway.learning.shadow import Shadows
from gateway.learning.training_child import TrainingChild
from gateway.learning.training_steps import TrainingWork, results_wait
from gateway.learning.watch import Watch
from gateway.model_plans import ModelPlans
from gateway.model_shelf import ModelShelf
from gateway.monitoring.canary import Canary
from gateway.monitoring.drift_alarms import DriftWatch, bundle_baselines
from gateway.results.encoding import Encoding
from gateway.results.inference import Inference
from gateway.results.orders import Orders
from gateway.results.rehearsal import rehearse
from gateway.scheduled_jobs import JobSteps
from gateway.settings import Settings, SettingsInvalid, read_secret, secret
from gateway.state import open_database, open_registry, open_spool, software_version
from gateway.steps import ResultWork, StudyWork
from gateway.workflows import (
    Story,
    register_delivery_workflows,
    register_job_workflows,
    register_shadow_workflows,
    register_study_workflows,
    register_training_workflows,
)
from storage.database import Database
from storage.errors import DatabaseAway, StorageError
from storage.spool import Spool

_log = structlog.get_logger(__name__)
_AWAY_PAUSE_S = 2.0
_RETENTION_MOST_S = 60.0  # canaries and other jobs wait behind it
_HEADERS_KEPT = 1024  # some tens of kB each

Boundary = Callable[[str], None]


def run_worker(settings: Settings, *, stop: threading.Event, boundary: Boundary = lambda _name: None) -> None:
    """Assembly, routing, inference, results, until `stop`. `boundary` hears of every step's begin and end."""
    worker = settings.gateway.worker
    database, spool, registry = open_database(settings), open_spool(settings), open_registry(settings)
    shelf = ModelShelf(
        registry,
        device=worker.device,
        threads=worker.threads,
        plans=ModelPlans(settings.models_dir),
        scratch=settings.state_dir,
    )
    enqueuer = Enqueuer(database)
    heartbeat = _heartbeat(settings, database, role="worker")
    encoding = Encoding(
        database=database, spool=spool, shelf=shelf, settings=settings, software_version=software_version()
    )
    routes = RoutesFile(settings.routes_file, database, serves=shelf.serves)

    # Objects never change: what assembly read for the slice gaps, routing need not read again.
    @lru_cache(maxsize=_HEADERS_KEPT)
    def headers(spool_path: str) -> Dataset:
        return read_header(spool.resolve(spool_path)).dataset

    share = DeviceShare(budget_bytes=worker.memory_budget_mb << 20 if worker.memory_budget_mb else None)
    watch = Watch(
        database=database,
        registry=registry,
        shelf=shelf,
        learning=settings.learning,
        withdrawal=Withdrawal(database=database, spool=spool, shelf=shelf, enqueuer=enqueuer),
    )
    shadows = Shadows(
        database=database,
        spool=spool,
        shelf=shelf,
        enqueuer=enqueuer,
        learning=settings.learning,
        attempts=worker.attempts,
        share=share,
        disabled_checks=settings.gateway.quality.disabled_checks,
        busy=lambda work: heartbeat.busy(work, worker.inference_deadline_s),
        idle=heartbeat.idle,
        finished=lambda name: consider_promotion(database, registry, settings, name),
    )
    studies = StudyWork(
        database=database,
        routes=routes,
        headers=headers,
        orders=Orders(database=database, spool=spool, shelf=shelf, enqueuer=enqueuer, unusable=watch.unusable),
        canary_ae=settings.gateway.canary.ae_title,
    )
    results = ResultWork(
        database=database,
        inference=Inference(
            database=database,
            spool=spool,
            shelf=shelf,
            attempts=worker.attempts,
            share=share,
            busy=lambda result_id: heartbeat.busy(result_id, worker.inference_deadline_s),
            idle=heartbeat.idle,
        ),
        encoding=encoding,
        release=Release(database=database, destinations=settings.destinations, enqueuer=enqueuer),
        shelf=shelf,
        disabled_checks=settings.gateway.quality.disabled_checks,
        watch=watch.look,
        shadow=shadows.order,
    )
    durable.configure(database, executor_id=executor_id("worker"))
    execution = durable.Execution()
    story = Story(attempts=worker.attempts, step=execution.step, wait=execution.wait, boundary=boundary)
    register_study_workflows(story, studies, results, attempts=worker.attempts)
    register_shadow_workflows(story, shadows, attempts=worker.attempts)
    drift = DriftWatch(
        database=database,
        settings=settings.gateway.drift,
        learning=settings.learning,
        state_dir=settings.state_dir,
        baselines=bundle_baselines(registry),
    )
    policy = LearningPolicy(database=database, enqueuer=enqueuer, registry=registry, settings=settings)
    canary = Canary(
        database=database, spool=spool, settings=settings, registry=registry, shelf=shelf, enqueuer=enqueuer
    )

    deletions = Deletions(
        database=database,
        spool=spool,
        enqueuer=enqueuer,
        settings=settings,
        boundary=lambda point: boundary(f"deletion {point}"),
    )
    retention = Retention(
        database=database,
        spool=spool,
        settings=settings,
        deletions=deletions,
        shadows=lambda: versions_in_shadow(registry),
        most_s=_RETENTION_MOST_S,
    )

    def drift_and_policy() -> str:
        said, found = drift.run()
        return "; ".join(filter(None, (said, policy.after_drift(found))))

    jobs: Mapping[str, Callable[[], str]] = {
        "drift": drift_and_policy,
        "learning": policy.look_at_waiting,
        "retraining": policy.retrain_all,
        "canary": canary.run,
        CANARY_CHECK: canary.check,
        "retention": retention.run,
        DELETION: deletions.finish_all,
    }
    register_job_workflows(story, JobSteps(database, jobs), attempts=worker.attempts)
    trainings = TrainingWork(
        settings=settings,
        database=database,
        spool=spool,
        registry=registry,
        shelf=shelf,
        enqueuer=enqueuer,
        child=TrainingChild(stop=stop, studies_wait=lambda: results_wait(database)),
    )
    register_training_workflows(story, trainings, attempts=worker.attempts)
    heartbeat.start()
    try:
        check_registry(database, registry)
        watch.check_at_start(lambda model: check_at_startup(registry, settings, model.name, model.semver))
        _log.info("models loaded", models=shelf.warm())
    except StorageError as error:
        _log.error("a model could not be loaded; studies for it will be parked", error=str(error))
    with contextlib.suppress(RulesInvalid):  # alarmed already; without any good rules a study is parked
        routes.current()
    rehearse()
    queues = [(STUDIES, 2), *((name, worker.concurrency) for name in (INFERENCE, URGENT_INFERENCE))]
    queues += [(JOBS, 1), (SHADOW, 1)]
    if worker.trainings and find_spec("torch") is not None:
        queues.append((TRAINING, worker.trainings))
    durable.launch(queues=queues, poll_s=worker.poll_s)
    heartbeat.take_over()
    expected_counts = ExpectedCounts(calling_ae=settings.gateway.receiver.ae_title)
    assembly = Assembly(
        database,
        settings,
        expected_count=expected_counts,
        headers=headers,
        enqueue=lambda session, version: enqueue_version(session, enqueuer, version),
        indexed_until=IndexMark(spool.root).read,
    )
    try:
        while not stop.wait(worker.poll_s):
            try:
                assembly.tick()
                watch.tend()
                with contextlib.suppress(RulesInvalid):  # told before a study needs it
                    routes.current()
            except DatabaseAway as error:
                _log.warning("assembly waits for the database", error=str(error))
                stop.wait(_AWAY_PAUSE_S)
    finally:
        share.close()
        execution.stop()
        heartbeat.stop()
        expected_counts.close()
        enqueuer.close()
        shelf.close()
        database.close()


def run_services(
    settings: Settings, *, roles: tuple[str, ...], stop: threading.Event, boundary: Boundary = lambda _name: None
) -> None:
    """Delivery, scheduler, web: those of `roles`, in one process, until `stop`."""
    from gateway.scheduler import Scheduler
    from gateway.web import make_app, server
    from gateway.web_server import WebServer

    database, spool = open_database(settings), open_spool(settings)
    closing: list[Callable[[], object]] = [database.close]
    duties: list[Callable[[], None]] = []  # done every second
    try:
        if "delivery" in roles:
            closing.append(_start_delivery(settings, database, spool, boundary=boundary))
        if "scheduler" in roles:
            scheduler = Scheduler(settings, database)
            scheduler.start()
            closing.append(scheduler.stop)
            duties.append(ReserveWatch(database, spool).look)
        if "web" in roles:
            own = settings.gateway.web
            web = WebServer(
                lambda: server(make_app(settings, database, spool), own), database, where=f"{own.host}:{own.port}"
            )
            closing.append(web.stop)
            duties.append(web.tend)
        while not stop.is_set():
            for duty in duties:
                duty()
            stop.wait(1.0)
    finally:
        for close in reversed(closing):
            close()


def _start_delivery(settings: Settings, database: Database, spool: Spool, *, boundary: Boundary) -> Callable[[], None]:
    worker = settings.gateway.worker
    shelf = ModelShelf(open_registry(settings))
    encoding = Encoding(
        database=database, spool=spool, shelf=shelf, settings=settings, software_version=software_version()
    )
    clients = emr_connections(settings)
    destinations = settings.destinations
    reporting = Reporting(
        database=database,
        clients=clients,
        reported=ReportedObjects(database=database, pacs=destinations.pacs, objects_of=encoding.outgoing),
        bundle_of=lambda name, semver: shelf.bundle(shelf.version(name, semver)),
        institution=settings.gateway.institution,
        software_version=software_version(),
    )
    enqueuer = Enqueuer(database)
    dispatch = Dispatch(
        database=database,
        settings=destinations,
        pacs=pacs_destinations(settings),
        reporting=reporting,
        objects_of=encoding.outgoing,
        enqueuer=enqueuer,
    )
    heartbeat = _heartbeat(settings, database, role="delivery")
    durable.configure(database, executor_id=executor_id("delivery"))
    execution = durable.Execution()
    story = Story(attempts=worker.attempts, step=execution.step, wait=execution.wait, boundary=boundary)
    register_delivery_workflows(story, dispatch)
    heartbeat.start()
    if clients:
        reporting.rehearse()
    # MLflow takes seconds to import; the first report shall not wait for it.
    shelf.known()
    concurrency = {d.name: d.concurrency for d in settings.destinations.all}
    # Of a destination that was taken out of the configuration nothing is said any more; its deliveries are taken up
    # once more, to be parked.
    with database.session() as session:
        forget_removed(session, concurrency)
    forgotten = [name for name in awaited_destinations(database) if name not in concurrency]
    queues = [(delivery_queue(name), concurrency.get(name, 1)) for name in [*concurrency, *forgotten]]
    durable.launch(queues=queues, poll_s=worker.poll_s)
    heartbeat.take_over()

    def close() -> None:
        execution.stop()
        heartbeat.stop()
        enqueuer.close()
        for client in clients.values():
            client.close()
        shelf.close()

    return close


def pacs_destinations(settings: Settings) -> Mapping[str, Destination]:
    """An adapter per configured PACS, by name."""
    calling = settings.gateway.receiver.ae_title
    configured = settings.destinations
    return {
        **{d.name: DimsePacs(d, calling_ae_title=calling) for d in configured.dimse},
        **{d.name: DicomWebPacs(d) for d in configured.dicomweb},
        **{d.name: OrthancPacs(d) for d in configured.orthanc},
    }


def emr_connections(settings: Settings) -> Mapping[str, Emr]:
    """Per configured EMR, by name. A secret that cannot be read or used is told by the first contact with its EMR."""
    return {d.name: EmrConnection(partial(_emr_client, d)) for d in settings.destinations.fhir}


def emr_clients(settings: Settings) -> Mapping[str, EmrClient]:
    """The same, connected at once; raises SettingsInvalid when a secret cannot be read or used."""
    try:
        return {d.name: _emr_client(d) for d in settings.destinations.fhir}
    except CredentialsInvalid as error:
        raise SettingsInvalid(str(error)) from error


def _emr_client(destination: FhirDestination) -> EmrClient:
    endpoint = EmrEndpoint(
        base_url=destination.url,
        patient_identifier_system=destination.patient_identifier_system,
        authorization=_authorization(destination),
        accepted_issuers=frozenset(destination.accepted_issuers),
    )
    return EmrClient(endpoint, open_http(timeout_s=destination.timeout_s, ca_file=destination.ca_file))


def _authorization(destination: FhirDestination) -> Authorization:
    key = f"fhir {destination.name}"
    if destination.auth == "token":
        return StaticToken(
            _secret_for_emr(partial(secret, file=destination.token_file, env=destination.token_env, key=key))
        )
    if destination.auth == "basic" and destination.password_file is not None:
        password = partial(read_secret, destination.password_file, f"{key}: password_file")
        return Basic(destination.username, _secret_for_emr(password))
    if destination.auth == "smart" and destination.smart is not None:
        smart = destination.smart
        return SmartBackendServices(
            base_url=destination.url,
            client_id=smart.client_id,
            private_key_pem=_secret_for_emr(partial(read_secret, smart.key_file, f"{key}: key_file"))(),
            key_id=smart.key_id,
            scope=smart.scope,
            token_url=smart.token_url,
        )
    return NoAuthorization()


def _secret_for_emr(read: Callable[[], str]) -> Callable[[], str]:
    """`read` with the EMR side's error: a file that is absent, or just being replaced, is waited for there."""

    def read_for_emr() -> str:
        try:
            return read()
        except SettingsInvalid as error:
            raise CredentialsInvalid(str(error)) from error

    return read_for_emr


def _heartbeat(settings: Settings, database: Database, *, role: str) -> Heartbeat:
    worker = settings.gateway.worker
    return Heartbeat(
        database, role=role, beat_s=worker.heartbeat_s, takeover_s=worker.takeover_s, recover=durable.recover
    )
