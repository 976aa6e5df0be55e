"""What `seggate check` says of this machine, before the first start and after it."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import zoneinfo
from datetime import timedelta
from pathlib import Path

import pytest

from engine.bundle import load_bundle
from gateway import checks
from gateway.checks import Status
from gateway.intake.routing_rules import parse_rules
from gateway.state import open_registry, open_spool
from storage import ledger
from storage.database import Database
from storage.records import utc_now
from tests.support.config_folder import LOOPBACK_SENDER, settings_in, write_config

ROUTE = """
[[rules]]
name = "hippocampus"
model = "hippocampus-mr"
[rules.when]
all = [{ attribute = "Modality", op = "equals", value = "MR" }]
"""


def test_every_fault_of_every_file_is_named_with_its_place(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        gateway='colour = "red"\n[[senders]]\nae_title = "WITH\\\\BACKSLASH"\n',
        destinations='[[dimse]]\nname = "pacs"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = 0\n',
        routes=ROUTE.replace('"Modality"', '"Modalty"'),
    )
    (config / "logging.toml").write_text('level = "loud"\n')
    findings, settings, rules = checks.check_configuration(config)
    assert (settings, rules) == (None, None)
    assert {f.status for f in findings} == {Status.FAILED}
    said = "\n".join(f.detail for f in findings)
    for file, place in (
        ("gateway.toml", "receiver.colour"),
        ("gateway.toml", "senders[0].ae_title"),
        ("destinations.toml", "dimse[0].port"),
        ("logging.toml", "level"),
        ("routes.toml", "Modalty"),
    ):
        assert any(file in f.detail and place in f.detail for f in findings), (file, place, said)


def test_a_file_that_is_no_toml_and_one_that_is_absent_are_named(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (config / "destinations.toml").write_text("[[dimse]\n")
    (config / "routes.toml").unlink()
    details = [f.detail for f in checks.check_configuration(config)[0]]
    assert any("destinations.toml: not valid TOML" in d and "line 1" in d for d in details)
    assert any("routes.toml does not exist" in d for d in details)


def test_valid_files_are_one_line_and_absent_optional_ones_are_named(tmp_path: Path) -> None:
    config = write_config(tmp_path, routes=ROUTE)
    (config / "logging.toml").unlink()
    findings, settings, rules = checks.check_configuration(config)
    assert [f.status for f in findings] == [Status.OK]
    assert "1 routes" in findings[0].detail
    assert "defaults for learning.toml, logging.toml" in findings[0].detail
    assert settings is not None
    assert rules is not None


@pytest.mark.requirement("REC-04", open="one-click add")
def test_an_empty_allow_list_is_a_warning_that_nobody_may_send(tmp_path: Path) -> None:
    finding = checks.check_senders(settings_in(tmp_path))
    assert finding.status is Status.WARNING
    assert "nobody may send" in finding.detail


def test_a_sender_without_addresses_is_a_warning(tmp_path: Path) -> None:
    open_to_all = settings_in(tmp_path / "a", gateway='[[senders]]\nae_title = "CT1"\n')
    assert checks.check_senders(open_to_all).status is Status.WARNING
    assert checks.check_senders(settings_in(tmp_path / "b", gateway=LOOPBACK_SENDER)).status is Status.OK


def test_the_disk_check_before_the_first_start_leaves_nothing_behind(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    findings = checks.check_disk(settings)
    assert [f.check for f in findings] == ["disk sync", "disk space"]
    assert Status.FAILED not in {f.status for f in findings}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_not_called_a_lack_of_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, prepared: bool
) -> None:
    settings = settings_in(tmp_path)
    if prepared:
        open_spool(settings).prepare()

    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("storage.spool.write_file", full)
    (finding,) = checks.check_disk(settings)
    assert (finding.check, finding.status) == ("disk space", Status.FAILED)
    assert "no space is left" in finding.detail


def test_the_disk_check_uses_the_spool_that_is_there(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    open_spool(settings).prepare()
    assert "made at the first start" not in checks.check_disk(settings)[0].detail
    assert list((settings.spool_dir / "tmp").iterdir()) == []


@pytest.mark.requirement("REC-02")
def test_less_free_space_than_the_reserve_fails_with_both_numbers(tmp_path: Path) -> None:
    free_mb = shutil.disk_usage(tmp_path).free >> 20
    space = checks.check_disk(settings_in(tmp_path, reserve_mb=free_mb * 4 + 1000))[-1]
    assert (space.check, space.status) == ("disk space", Status.FAILED)
    assert str(free_mb * 4 + 1000) in space.detail


def test_a_spool_in_memory_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_file_system", lambda path: "tmpfs")
    finding = checks.check_disk(settings_in(tmp_path))[0]
    assert finding.status is Status.WARNING
    assert "power cut" in finding.detail


def test_a_spool_that_cannot_be_written_fails(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    open_spool(settings).prepare()
    (settings.spool_dir / "tmp").rmdir()
    (settings.spool_dir / "tmp").symlink_to("/proc")  # no user can write there, root neither
    assert checks.check_disk(settings)[0].status is Status.FAILED


def test_the_database_is_not_created_by_looking_at_it(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    finding, database = checks.check_database(settings)
    assert (finding.status, database) == (Status.OK, None)
    assert "not yet created" in finding.detail
    assert not settings.state_dir.exists()


def test_a_database_of_this_release_is_ok_and_one_of_a_newer_release_fails(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    database = Database(settings.database_url)
    database.migrate()
    finding, found = checks.check_database(settings)
    assert finding.status is Status.OK
    assert found is not None
    found.close()
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE seggate_revision SET version_num = '9999'")
    database.close()
    finding, found = checks.check_database(settings)
    assert (finding.status, found) == (Status.FAILED, None)
    assert "newer release" in finding.detail


def test_a_database_server_that_is_away_fails_without_showing_the_password(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        port = taken.getsockname()[1]
        settings = settings_in(tmp_path, gateway=f'[database]\nurl = "postgresql://u:very-secret@127.0.0.1:{port}/db"')
        finding, found = checks.check_database(settings)
    assert (finding.status, found) == (Status.FAILED, None)
    assert "very-secret" not in finding.detail


def test_a_url_that_is_none_fails_without_showing_it(tmp_path: Path) -> None:
    finding, _ = checks.check_database(settings_in(tmp_path, gateway='[database]\nurl = "oracle:very-secret"'))
    assert finding.status is Status.FAILED
    assert "very-secret" not in finding.detail


@pytest.mark.requirement("OPS-64", open="DST, ordering and claims under a clock step")
def test_a_clock_before_the_newest_event_fails(tmp_path: Path) -> None:
    database = Database(settings_in(tmp_path).database_url)
    database.create_all()
    with database.session() as session:
        ledger.append(session, subject="gateway", kind="started", actor="test", at=utc_now() + timedelta(hours=2))
    clock = checks.check_clock(database, None)[0]
    database.close()
    assert clock.status is Status.FAILED
    assert "before the newest event" in clock.detail


def test_what_the_kernel_says_about_synchronisation_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, status, words in (
        (True, Status.OK, "is synchronised"),
        (False, Status.WARNING, "not synchronised"),
        (None, Status.OK, "not checked"),
    ):
        monkeypatch.setattr(checks, "clock_synchronised", lambda answer=said: answer)
        found = next(f for f in checks.check_clock(None, None) if f.check == "clock sync")
        assert found.status is status
        assert words in found.detail


def test_a_time_zone_without_data_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = parse_rules('time_zone = "UTC"\nrules = []\n')

    def no_data(name: str) -> None:
        raise zoneinfo.ZoneInfoNotFoundError(name)

    monkeypatch.setattr(zoneinfo, "ZoneInfo", no_data)
    found = next(f for f in checks.check_clock(None, rules) if f.check == "time zone")
    assert found.status is Status.FAILED


def test_a_free_port_is_free_a_taken_one_is_asked_further_and_a_foreign_address_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert checks.check_bind("port", "127.0.0.1", server.getsockname()[1]) is None
        port = server.getsockname()[1]
    free = checks.check_bind("port", "127.0.0.1", port)
    assert free is not None
    assert free.status is Status.OK
    foreign = checks.check_bind("port", "203.0.113.1", 11112)
    assert foreign is not None
    assert foreign.status is Status.FAILED


@pytest.mark.requirement("INF-35", open="licence enforced, GPU named")
def test_a_model_that_a_route_names_must_serve_here_and_be_unchanged(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, routes=ROUTE)
    rules = parse_rules(ROUTE)
    missing = checks.check_models(settings, rules)
    assert [f.status for f in missing] == [Status.FAILED]
    assert "seggate models import" in missing[0].detail
    assert not settings.models_dir.exists()

    source = Path(checks.__file__).parent / "demo" / "model"
    bundle = load_bundle(source)
    settings.models_dir.mkdir(parents=True)
    registry = open_registry(settings)
    model = registry.register(
        source,
        name="hippocampus-mr",
        semver="1.0.0",
        weights_digest=bundle.weights_digest,
        configuration_digest=bundle.configuration_digest,
        licence=bundle.licence,
        description="",
        serve=False,
    )
    waiting = checks.check_models(settings, rules)
    assert [f.status for f in waiting] == [Status.OK, Status.FAILED]
    assert "`seggate models promote hippocampus-mr 1.0.0`" in waiting[1].detail
    registry.promote("hippocampus-mr", "1.0.0")
    assert [f.status for f in checks.check_models(settings, rules)] == [Status.OK]
    weights = next(model.folder.rglob("*.onnx"))
    weights.write_bytes(weights.read_bytes() + b"\0")
    changed = checks.check_models(settings, rules)
    assert [f.status for f in changed] == [Status.FAILED]
    assert weights.name in changed[0].detail


def test_what_computes_here_is_named_and_a_device_on_which_nothing_does_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    from engine import backend_probe

    backend_probe.probe.cache_clear()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(backend_probe, "_DRIVERS", ())
    found = checks.check_runtime(settings_in(tmp_path / "a"))
    assert found.status is Status.OK
    assert f"onnxruntime {onnxruntime.__version__} on cpu (float32)" in found.detail
    assert "openvino" in found.detail
    asked = checks.check_runtime(settings_in(tmp_path / "b", gateway='[worker]\ndevice = "cuda"'))
    assert asked.status is Status.FAILED
    assert "no CUDA provider" in asked.detail
    backend_probe.probe.cache_clear()
