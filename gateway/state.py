"""The three places of state, opened from the settings: database, spool, model registry (docs/operations.md).

Light on purpose: the indexer, the supervisor and short commands import this and not the whole gateway.
"""

from __future__ import annotations

from importlib.metadata import version as installed_version

from gateway.settings import Settings
from storage.database import Database
from storage.models import ModelRegistry
from storage.spool import Spool


def software_version() -> str:
    return installed_version("seggate")


def open_database(settings: Settings) -> Database:
    return Database(settings.database_url, pool_size=settings.gateway.database.pool_size)


def open_spool(settings: Settings) -> Spool:
    return Spool(settings.spool_dir, reserve_bytes=settings.gateway.receiver.reserve_mb << 20)


def open_registry(settings: Settings) -> ModelRegistry:
    return ModelRegistry(settings.models_dir, url=settings.gateway.database.registry_url)


def prepare_state(settings: Settings) -> Database:
    """Make the folders, bring the database to the newest revision; called once before the processes start."""
    from gateway import durable

    settings.state_dir.mkdir(parents=True, exist_ok=True)
    settings.models_dir.mkdir(parents=True, exist_ok=True)
    open_spool(settings).prepare()
    database = open_database(settings)
    database.migrate()
    durable.prepare(database)
    return database
