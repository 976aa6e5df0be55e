"""What `seggate check` looks at on this machine: files, disk, clock, ports, database, models, senders.

Each check says ok, warning or failed, with what was seen and what to do. Nothing is created or changed, so that the
checks can run before the first start (by any user) and beside a running gateway. The other side: peer_checks.py.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import socket
import tempfile
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import psutil
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from gateway.intake.routing_rules import RuleSet, RulesInvalid, parse_rules
from gateway.settings import FILES, Settings, SettingsInvalid, load_settings
from storage.database import Database
from storage.errors import DatabaseAway, StorageError
from storage.records import LedgerEvent, utc_now
from storage.spool import Spool

_SLOW_SYNC_S = 0.25
_CLOCK_TOLERANCE = timedelta(seconds=5)
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_TIMEX_BYTES = 1024  # struct timex has 208; the rest is room
_VOLATILE = frozenset({"tmpfs", "ramfs"})
_REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p"})


class Status(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report: `check` names what was looked at, `detail` what was seen and what to do."""

    check: str
    status: Status
    detail: str


def ok(check: str, detail: str) -> Finding:
    return Finding(check=check, status=Status.OK, detail=detail)


def warning(check: str, detail: str) -> Finding:
    return Finding(check=check, status=Status.WARNING, detail=detail)


def failed(check: str, detail: str) -> Finding:
    return Finding(check=check, status=Status.FAILED, detail=detail)


def check_configuration(folder: Path) -> tuple[list[Finding], Settings | None, RuleSet | None]:
    """All four files, with the place of every fault. Settings and rules are None where they cannot be used."""
    settings: Settings | None = None
    rules: RuleSet | None = None
    findings: list[Finding] = []
    try:
        settings = load_settings(folder)
    except SettingsInvalid as error:
        findings += [failed("configuration", line) for line in str(error).splitlines()]
    absent = [name for name in FILES[1:] if not (folder / name).is_file()]
    if "routes.toml" in absent:
        findings.append(failed("configuration", f"{folder / 'routes.toml'} does not exist: nothing can be routed"))
        absent.remove("routes.toml")
    else:
        try:
            rules = parse_rules(
                (folder / "routes.toml").read_text(encoding="utf-8"), source=str(folder / "routes.toml")
            )
        except RulesInvalid as error:
            findings += [failed("configuration", line) for line in str(error).splitlines()]
        except UnicodeDecodeError:
            findings.append(failed("configuration", f"{folder / 'routes.toml'}: not UTF-8 text"))
        except OSError as error:
            findings.append(failed("configuration", f"{folder / 'routes.toml'}: {error.strerror}"))
    if settings is not None and rules is not None:
        there = [name for name in FILES if name not in absent]
        defaults = f"; defaults for {', '.join(absent)}" if absent else ""
        findings.append(ok("configuration", f"{', '.join(there)} in {folder}: {len(rules.rules)} routes{defaults}"))
    return findings, settings, rules


def check_senders(settings: Settings) -> Finding:
    """The allow-list: empty means that nobody may send (REC-04)."""
    senders = settings.gateway.senders
    if not senders:
        return warning("senders", "nobody may send: add the scanner's AE title to [[senders]] in gateway.toml")
    anywhere = [s.ae_title for s in senders if not s.addresses]
    names = ", ".join(s.ae_title for s in senders)
    if anywhere:
        return warning("senders", f"{names}; from any address: {', '.join(anywhere)} (set `addresses`)")
    return ok("senders", names)


def check_disk(settings: Settings) -> list[Finding]:
    """Durability and space where the spool is, or will be: write, sync, rename, sync the folder (REC-01, REC-02)."""
    root = settings.spool_dir
    reserve_bytes = settings.gateway.receiver.reserve_mb << 20
    findings: list[Finding] = []
    try:
        if (root / "tmp").is_dir():
            spool = Spool(root, reserve_bytes)
            seconds, where = spool.check_sync(), str(root)
            free = spool.free_bytes()
            devices = {
                p.stat().st_dev for p in (root, *(root / n for n in ("tmp", "incoming", "studies"))) if p.is_dir()
            }
            if len(devices) > 1:
                findings.append(
                    failed("disk sync", f"{root}: its folders are on different file systems, so a rename cannot work")
                )
        else:
            parent = _nearest_folder(root)
            where = f"{root} (made at the first start)"
            with tempfile.TemporaryDirectory(prefix=".seggate-check-", dir=parent) as scratch:
                spool = Spool(Path(scratch), reserve_bytes)
                spool.prepare()
                seconds, free = spool.check_sync(), spool.free_bytes()
    except (StorageError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}:
            return [failed("disk space", f"{root}: no space is left; nothing is accepted or written until there is")]
        words = error.strerror if isinstance(error, OSError) else str(error)
        return [failed("disk sync", f"{root} cannot be written by this user: {words}")]
    findings += [_sync_finding(where, seconds, _file_system(root)), _space_finding(free, reserve_bytes)]
    return findings


def check_state_folders(settings: Settings) -> Finding:
    """State and models folder: writable, or can be made."""
    for folder in (settings.state_dir, settings.models_dir):
        place = _nearest_folder(folder)
        if not os.access(place, os.W_OK | os.X_OK):
            return failed("state folders", f"{place} cannot be written by this user (for {folder})")
    return ok("state folders", f"{settings.state_dir}, {settings.models_dir}")


def check_database(settings: Settings) -> tuple[Finding, Database | None]:
    """Reachable and at this program's revision; the Database is given back where it can be asked further.

    A database file that does not exist is not made here.
    """
    try:
        database = Database(settings.database_url, pool_size=1)
    except SettingsInvalid as error:
        return failed("database", str(error)), None
    except (SQLAlchemyError, ImportError):
        # The message of the driver would repeat the URL, which may hold a password.
        return failed("database", "database.url is no URL of SQLite or PostgreSQL"), None
    kind = database.url.get_backend_name()
    if database.is_sqlite and database.url.database and not Path(database.url.database).exists():
        database.close()
        return ok("database", f"{kind}: not yet created; the first start makes it"), None
    try:
        current, newest = database.revision()
    except (DatabaseAway, SQLAlchemyError) as error:
        database.close()
        words = str(error) if isinstance(error, DatabaseAway) else type(error).__name__
        return failed("database", f"{kind}: {words}"), None
    if current == newest:
        return ok("database", f"{kind}: reachable, revision {current}"), database
    database.close()
    if current is None:
        return ok("database", f"{kind}: reachable, empty; the first start makes the tables"), None
    if current is not None and newest is not None and _known_revision(current):
        return warning("database", f"{kind}: revision {current}; the next start brings it to {newest}"), None
    return failed("database", f"{kind}: revision {current} is of a newer release than this one ({newest})"), None


def check_clock(database: Database | None, rules: RuleSet | None) -> list[Finding]:
    """Not before what was already recorded; time zone data; synchronisation as the kernel says (OPS-64)."""
    findings: list[Finding] = []
    newest = _newest_event(database) if database is not None else None
    now = utc_now()
    if newest is not None and newest > now + _CLOCK_TOLERANCE:
        behind = (newest - now).total_seconds()
        findings.append(failed("clock", f"{behind:.0f} s before the newest event of the ledger: set the clock right"))
    else:
        findings.append(ok("clock", f"{now.astimezone():%Y-%m-%d %H:%M:%S %Z}"))
    zone = rules.time_zone if rules is not None else "UTC"
    try:
        zoneinfo.ZoneInfo(zone)
        findings.append(ok("time zone", f"{zone} (routes.toml)"))
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        findings.append(failed("time zone", f"no data for {zone}: install the system's tzdata"))
    synchronised = clock_synchronised()
    if synchronised is None:
        findings.append(ok("clock sync", "not checked: this system does not say"))
    elif synchronised:
        findings.append(ok("clock sync", "the kernel says that the clock is synchronised"))
    else:
        findings.append(warning("clock sync", "the clock is not synchronised: set up NTP (chrony, systemd-timesyncd)"))
    return findings


def check_models(settings: Settings, rules: RuleSet | None) -> list[Finding]:
    """Registered bundles are what was registered, and every model that a route names has a version that serves."""
    from mlflow.exceptions import MlflowException

    from engine.errors import EngineError
    from gateway.model_shelf import ModelShelf
    from gateway.state import open_registry, registry_exists
    from storage.models import CHAMPION, RegisteredModel

    wanted = sorted({r.model for r in rules.rules if r.enabled and r.model}) if rules is not None else []
    registered: Sequence[RegisteredModel] = ()
    registry = open_registry(settings)
    if registry_exists(settings):
        try:
            registered = registry.all()
        except (MlflowException, SQLAlchemyError) as error:
            return [failed("models", f"the registry cannot be read: {type(error).__name__}")]
    findings: list[Finding] = []
    shelf = ModelShelf(registry)
    for model in registered:
        if model.state == "retired":
            continue
        name = f"{model.name} {model.semver} ({model.state})"
        try:
            shelf.bundle(model)
            findings.append(ok("models", f"{name}: files are those that were registered"))
        except (EngineError, StorageError) as error:
            report = failed if model.state == CHAMPION else warning
            findings.append(report("models", f"{name}: {error}"))
    serving = {m.name for m in registered if CHAMPION in m.aliases}
    for missing in (name for name in wanted if name not in serving):
        waiting = [m.semver for m in registered if m.name == missing]
        detail = (
            f"routes.toml names {missing!r}, of which no version serves: `seggate models promote {missing} "
            f"{waiting[-1]}`, or import it with --orientation if nobody stated that"
            if waiting
            else f"routes.toml names {missing!r}, which is not here: `seggate models import PATH --name {missing}`; a "
            f"bundle gets its name when it is exported: `seggate export DATASET --name {missing}`"
        )
        findings.append(failed("models", detail))
    if not findings:
        findings.append(warning("models", "none: no route names a model, and none is registered"))
    return findings


def check_runtime(settings: Settings) -> Finding:
    """What inference can run on: each runtime has computed a small network here, or it does not count."""
    from engine.backend_probe import available_backends

    device = settings.gateway.worker.device
    found = available_backends(device)
    running = [status for status in found if status.is_available]
    exact = [status for status in running if status.precision == "float32"]
    if not exact:
        return failed("inference", f"nothing computes on worker.device = {device!r}: {'; '.join(map(str, found))}")
    return ok("inference", ", ".join(f"{s.runtime} {s.version} on {s.provider} ({s.precision})" for s in running))


def check_bind(check: str, host: str, port: int) -> Finding | None:
    """Whether the port can be listened on; None where something listens there already."""
    if port == 0:
        return ok(check, f"{host}: any free port")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except socket.gaierror as error:
        return failed(check, f"{host}: {error.strerror}")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        if error.errno == errno.EACCES:
            return failed(check, f"{host}:{port}: this user may not listen below port 1024; choose a higher port")
        return failed(check, f"{host}:{port}: {error.strerror}")
    return ok(check, f"{host}:{port} is free")


def clock_synchronised() -> bool | None:
    """What the kernel says (adjtimex(2), reading only); None where it does not say."""
    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return None
    state = int(adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)))
    return None if state < 0 else state != _TIME_ERROR


def _nearest_folder(path: Path) -> Path:
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _file_system(path: Path) -> str:
    """The type of the file system that holds the path ("ext4"); empty where it is not known."""
    place = _nearest_folder(path).resolve()
    holding = [p for p in psutil.disk_partitions(all=True) if place.is_relative_to(p.mountpoint)]
    return max(holding, key=lambda p: len(p.mountpoint)).fstype if holding else ""


def _sync_finding(where: str, seconds: float, file_system: str) -> Finding:
    took = f"{where}: written, synced and renamed in {1000 * seconds:.0f} ms" + (file_system and f" on {file_system}")
    if file_system in _VOLATILE:
        return warning("disk sync", f"{took}: this is memory; nothing there survives a power cut")
    if file_system in _REMOTE:
        return warning("disk sync", f"{took}: a network file system may lose what it calls synced; use a local disk")
    if seconds > _SLOW_SYNC_S:
        return warning("disk sync", f"{took}: every object waits for this")
    return ok("disk sync", took)


def _space_finding(free_bytes: int, reserve_bytes: int) -> Finding:
    text = f"{free_bytes >> 20} MB free, reserve {reserve_bytes >> 20} MB (receiver.reserve_mb)"
    if free_bytes < reserve_bytes:
        return failed("disk space", f"{text}: nothing is accepted until there is more")
    if free_bytes < 2 * reserve_bytes:
        return warning("disk space", f"{text}: little is left")
    return ok("disk space", text)


def _known_revision(revision: str) -> bool:
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    from storage.database import migration_config

    try:
        return ScriptDirectory.from_config(migration_config()).get_revision(revision) is not None
    except CommandError:
        return False


def _newest_event(database: Database) -> datetime | None:
    try:
        with database.reading() as session:
            return session.scalar(select(func.max(LedgerEvent.at)))
    except DatabaseAway:
        return None
