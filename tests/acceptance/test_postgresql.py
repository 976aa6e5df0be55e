"""The whole path with PostgreSQL instead of SQLite: one study, from C-STORE to PACS and EMR."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.demo.stage import Stage
from gateway.demo.story import follow, send, set_the_stage
from tests.support.peers import ROOT
from tests.support.postgresql import postgresql


class _OnPostgresql(Stage):
    """A demo stage whose gateway keeps its rows in PostgreSQL."""

    url: str = ""

    def write_config(self, routes: Path) -> None:
        super().write_config(routes)
        settings = self.config / "gateway.toml"
        settings.write_text(settings.read_text() + f'\n[database]\nurl = "{self.url}"\n')


@pytest.mark.peer("postgresql")
@pytest.mark.requirement("CARD-01", "CARD-03", "CARD-04")
def test_a_study_goes_the_whole_way_on_postgresql(tmp_path: Path) -> None:
    with postgresql() as url:
        stage = _OnPostgresql(tmp_path / "stage")
        stage.url = url
        try:
            source, studies = set_the_stage(stage, None, ROOT / "config" / "routes.toml", lambda _line: None)
            send(stage, source, lambda _done, _total: None)
            outcome = follow(stage, studies[0], timeout_s=240, tell=lambda _line: None)
        finally:
            stage.stop()
        assert outcome.verified, outcome.document
        assert not (tmp_path / "stage" / "state" / "seggate.sqlite").exists()
        assert [o["modality"] for o in outcome.in_pacs].count("SEG") == 1
        assert len(outcome.reports) == 1
