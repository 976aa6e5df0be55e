"""The three places of state, opened from the settings: database, spool, model registry (docs/operations.md).

Light on purpose: the indexer, the supervisor and short commands import this and not the whole gateway.
"""

from __future__ import annotations

import os
from importlib.metadata import version as installed_version
from pathlib import Path

from sqlalchemy import inspect

from gateway.settings import Settings, SettingsInvalid
from storage.database import Database
from storage.errors import DatabaseAway
from storage.models import ModelRegistry
from storage.records import Study
from storage.spool import Spool


def software_version() -> str:
    return installed_version("seggate")


def open_database(settings: Settings) -> Database:
    return Database(settings.database_url, pool_size=settings.gateway.database.pool_size)


def existing_database(settings: Settings) -> Database:
    """The database for a command that looks into it; never makes one (it would belong to whoever looked first).
    Nothing stays open between transactions.

    Raises DatabaseAway, with what to do, where no gateway was started yet.
    """
    database = Database(settings.database_url, pool_size=0)
    path = database.url.database
    if database.is_sqlite and path and not Path(path).exists():
        raise DatabaseAway(f"there is no database at {path} yet; `seggate serve` makes it")
    with database.reading() as session:
        if not inspect(session.connection()).has_table(Study.__tablename__):
            raise DatabaseAway("the database has no tables yet; `seggate serve` makes them")
    return database


def open_spool(settings: Settings) -> Spool:
    return Spool(settings.spool_dir, reserve_bytes=settings.gateway.receiver.reserve_mb << 20)


def open_registry(settings: Settings) -> ModelRegistry:
    return ModelRegistry(settings.models_dir, url=settings.gateway.database.registry_url)


def registry_exists(settings: Settings) -> bool:
    """False before the first import: opening the registry would make it."""
    return bool(settings.gateway.database.registry_url) or (settings.models_dir / "registry.sqlite").exists()


def prepare_state(settings: Settings) -> Database:
    """Make the folders, bring the database to the newest revision; called once before the processes start.

    Raises SettingsInvalid naming a folder that cannot be made or written, SpoolUnsafe, DatabaseAway.
    """
    from gateway import durable

    for key, folder in (("state_dir", settings.state_dir), ("models_dir", settings.models_dir)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(0, "no permission to write")
        except OSError as error:
            raise SettingsInvalid(
                f"{key}: {folder} cannot be written by this user: {error.strerror}; give it to the user that runs "
                f"seggate, or set {key} to another folder"
            ) from error
    open_spool(settings).prepare()
    database = open_database(settings)
    database.migrate()
    durable.prepare(database)
    return database
