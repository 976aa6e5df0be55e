"""Networks of versions that nothing needs any more leave a worker's memory.

Needed are what serves, what runs in shadow, and what a result that has not run yet was ordered from. A version that is
needed again, as after a rollback, is loaded by the first study that asks for it.
"""

from __future__ import annotations

import structlog
from sqlalchemy import select

from gateway.model_shelf import ModelShelf
from storage.database import Database
from storage.learning_records import ServingPeriod
from storage.records import Result, ResultState

_log = structlog.get_logger(__name__)


def close_idle_versions(database: Database, shelf: ModelShelf) -> None:
    """One look; a version that is in use at this moment is left to the next. Raises DatabaseAway."""
    loaded = shelf.loaded()
    if not loaded:
        return
    with database.reading() as session:
        serving = {
            (name, version)
            for name, version in session.execute(
                select(ServingPeriod.model_name, ServingPeriod.model_version).where(
                    ServingPeriod.model_name.in_(list(loaded)), ServingPeriod.ended_at.is_(None)
                )
            )
        }
        ordered = {
            (name, version)
            for name, version in session.execute(
                select(Result.model_name, Result.model_version)
                .where(Result.state == ResultState.PENDING, Result.runtime.is_(None))
                .distinct()
            )
        }
    for name, versions in loaded.items():
        needed = {version for known, version in serving | ordered if known == name}
        # Of a model without a period it is not known what serves.
        if versions <= needed or name not in {known for known, _ in serving}:
            continue
        shadow = shelf.shadow(name)
        closed = shelf.close_all_but(name, needed if shadow is None else needed | {shadow.semver})
        if closed:
            _log.info("networks that are needed no more were closed", model=name, versions=closed)
