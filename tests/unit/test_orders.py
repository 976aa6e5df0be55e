"""Under which identity work is ordered: recurring content is told apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.results.orders import content_key
from storage.database import Database
from storage.records import StudyState
from tests.support.story_rows import add_study, add_version


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield database
    database.close()


def test_content_that_comes_back_is_told_apart_from_its_first_time(database: Database) -> None:
    with database.session() as session:
        add_study(session, StudyState.WHOLE, version=3)
        first = add_version(session, 1, content_digest="a" * 64)
        other = add_version(session, 2, content_digest="b" * 64)
        again = add_version(session, 3, content_digest="a" * 64)
        keys = [content_key(session, version) for version in (first, other, again)]
    assert keys[:2] == ["a" * 64, "b" * 64]
    assert keys[2] not in keys[:2]
    assert len(keys[2]) == 64
