"""Settings: precedence, errors that name file and key, guards, secrets; the shipped files say the same."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from gateway.destination_settings import DestinationSettings, FhirDestination
from gateway.learning_settings import LearningSettings
from gateway.settings import (
    GatewaySettings,
    LoggingSettings,
    ReceiverSettings,
    SenderSettings,
    SettingsInvalid,
    WebSettings,
    load_settings,
    read_secret,
    secret,
)
from tests.support.config_folder import write_config
from tests.support.config_keys import documented_keys, model_keys, uncommented
from tests.support.peers import ROOT

CONFIG = ROOT / "config"
FILES: list[tuple[str, type[BaseModel]]] = [
    ("gateway.toml", GatewaySettings),
    ("destinations.toml", DestinationSettings),
    ("learning.toml", LearningSettings),
    ("logging.toml", LoggingSettings),
]
# Described once for all that have them: where a destination waits, and the completeness of one sender.
DESCRIBED_AT = {
    **{f"{kind}.": "dimse." for kind in ("dicomweb", "orthanc", "fhir")},
    "senders.completeness.": "completeness.",
}
COMMON = ("concurrency", "first_retry_s", "max_retry_s", "give_up_after_s")


def test_the_environment_wins_over_the_file_and_the_file_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, port=4242, gateway='ae_title = "FROMFILE"')
    assert load_settings(config).gateway.receiver.port == 4242
    monkeypatch.setenv("SEGGATE_RECEIVER__PORT", "4243")
    receiver = load_settings(config).gateway.receiver
    assert (receiver.port, receiver.ae_title, receiver.max_associations) == (4243, "FROMFILE", 64)


@pytest.mark.parametrize(
    ("file", "text", "key"),
    [
        ("gateway.toml", "[receiver]\nprot = 104", "receiver.prot"),
        ("gateway.toml", "colour = 1", "colour"),
        ("gateway.toml", '[[senders]]\nae_title = "A"\n[[senders]]\nae_title = ""', "senders[1].ae_title"),
        ("gateway.toml", "[receiver]\nport = 65536", "receiver.port"),
        ("gateway.toml", '[[senders]]\nae_title = "A"\naddresses = ["10.1.2"]', "senders[0]"),
        ("destinations.toml", '[[orthanc]]\nname = "Upper"\nurl = "http://x"', "orthanc[0].name"),
        ("destinations.toml", '[[dimse]]\nname = "pacs"\nae_title = "PACS"\nhost = "h"', "dimse[0].port"),
        ("gateway.toml", '[quality]\ndisabled_checks = ["border", "bordr"]', "quality.disabled_checks[1]"),
        ("logging.toml", 'level = "loud"', "level"),
    ],
)
def test_a_fault_names_the_file_and_the_key(tmp_path: Path, file: str, text: str, key: str) -> None:
    config = write_config(tmp_path)
    (config / file).write_text(text)
    with pytest.raises(SettingsInvalid) as caught:
        load_settings(config)
    line = str(caught.value)
    assert line.startswith(f"{config / file}: {key}: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[receiver]\nprot = 104", "receiver.prot: unknown key; did you mean port?"),
        ("[recever]\nport = 104", "recever: unknown key; did you mean receiver?"),
        ('[[senders]]\nae_title = "A"\ncompleteness = { quiet = 1 }', "senders[0].completeness.quiet: unknown key;"),
        ("colour = 1", "colour: unknown key"),
        ('[web]\nhost = "0.0.0.0"', "web: host: an address beyond loopback needs"),
    ],
)
def test_a_fault_says_what_to_write_instead(tmp_path: Path, text: str, words: str) -> None:
    config = write_config(tmp_path)
    (config / "gateway.toml").write_text(text)
    with pytest.raises(SettingsInvalid) as caught:
        load_settings(config)
    assert str(caught.value).startswith(f"{config / 'gateway.toml'}: {words}")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("SEGGATE_RECEIVER__PORT", "abc", "Input should be a valid integer"),
        ("SEGGATE_RECEIVER__PROT", "104", "unknown; did you mean SEGGATE_RECEIVER__PORT?"),
        ("SEGGATE_RECIEVER__PORT", "104", "no setting has this name; did you mean SEGGATE_RECEIVER?"),
        ("SEGGATE_STATE_DRI", "/x", "no setting has this name; did you mean SEGGATE_STATE_DIR?"),
        ("SEGGATE_SENDERS", "nonsense", "not valid JSON"),
        ("SEGGATE_SENDERS", '[{"ae_title": ""}]', "[0].ae_title: String should have"),
        ("SEGGATE_QUALITY__DISABLED_CHECKS", "nonsense", "not valid JSON"),
    ],
)
def test_a_fault_of_the_environment_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsInvalid) as caught:
        load_settings(write_config(tmp_path))
    assert str(caught.value).startswith(f"environment variable {variable}: {words}")


def test_a_fault_between_file_and_environment_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGGATE_WEB__HOST", "0.0.0.0")
    config = write_config(tmp_path)
    with pytest.raises(SettingsInvalid) as caught:
        load_settings(config)
    assert str(caught.value).startswith(f"{config / 'gateway.toml'}: web: host: an address beyond loopback needs")
    assert str(caught.value).endswith("(with SEGGATE_WEB__HOST from the environment)")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SEGGATE_EXECUTOR", "2"),
        ("SEGGATE_EMR_TOKEN", "s3cret"),
        ("seggate_receiver__port", "4243"),
        ("SEGGATE_SERVICE_HOST", "10.0.0.1"),
        ("SEGGATE_PORT", "tcp://10.0.0.1:104"),
        ("SEGGATE_WEB_PORT_8080_TCP_ADDR", "10.0.0.1"),
    ],
)
def test_a_variable_that_something_reads_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    emr = '[[fhir]]\nname = "emr"\nurl = "http://127.0.0.1:1"\npatient_identifier_system = "urn:oid:1.2"\n'
    load_settings(write_config(tmp_path, destinations=f'{emr}auth = "token"\ntoken_env = "SEGGATE_EMR_TOKEN"\n'))


def test_faults_of_several_files_are_told_together(tmp_path: Path) -> None:
    config = write_config(tmp_path, gateway="prot = 1", destinations="[[pacs]]")
    (config / "logging.toml").write_text("not toml")
    with pytest.raises(SettingsInvalid) as caught:
        load_settings(config)
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [
        str(config / name) for name in ("gateway.toml", "destinations.toml", "logging.toml")
    ]


def test_a_folder_without_gateway_toml_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match="--config or SEGGATE_CONFIG"):
        load_settings(tmp_path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (config / "logging.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsInvalid, match=r"logging\.toml: not valid TOML"):
        load_settings(config)


def test_only_gateway_toml_is_needed(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (config / "destinations.toml").unlink()
    (config / "logging.toml").unlink()
    settings = load_settings(config)
    assert (settings.destinations, settings.logging) == (DestinationSettings(), LoggingSettings())


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.1.5", "::", "gateway.hospital.example"])
def test_the_web_role_beyond_loopback_needs_a_token_or_client_certificates(host: str) -> None:
    with pytest.raises(ValidationError, match="beyond loopback"):
        WebSettings(host=host)
    assert WebSettings(host=host, token_env="TOKEN").host == host
    assert WebSettings(host=host, token_file=Path("t")).host == host
    certificates = {"client_ca": Path("ca"), "tls_certificate": Path("c"), "tls_key": Path("k")}
    assert WebSettings.model_validate({"host": host, **certificates}).host == host
    with pytest.raises(ValidationError, match="needs tls_certificate and tls_key"):
        WebSettings(host=host, client_ca=Path("ca"))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_the_web_role_on_loopback_needs_nothing(host: str) -> None:
    assert WebSettings(host=host).token_env == ""


def test_two_destinations_of_one_name_are_refused_whatever_their_kind() -> None:
    with pytest.raises(ValidationError, match="two destinations have the same name: pacs"):
        DestinationSettings.model_validate(
            {
                "orthanc": [{"name": "pacs", "url": "http://127.0.0.1:8042"}],
                "dimse": [{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104}],
            }
        )


@pytest.mark.parametrize("auth", ["token", "basic", "smart"])
def test_an_emr_login_without_its_credentials_is_refused(auth: str) -> None:
    with pytest.raises(ValidationError, match=f"auth = '{auth}' needs"):
        FhirDestination.model_validate(
            {"name": "emr", "url": "https://emr.example/fhir", "patient_identifier_system": "urn:oid:1.2", "auth": auth}
        )


@pytest.mark.parametrize("title", ["", " ", "SEVENTEEN-LETTERS", "BACK\\SLASH", "TAB\tTAB", "Zürich"])
def test_what_is_no_ae_title_is_refused(title: str) -> None:
    with pytest.raises(ValidationError):
        SenderSettings(ae_title=title)


def test_an_ae_title_loses_the_blanks_around_it() -> None:
    assert SenderSettings(ae_title=" CT 1 ").ae_title == "CT 1"


def test_settings_cannot_be_changed_after_they_were_read() -> None:
    with pytest.raises(ValidationError):
        ReceiverSettings().port = 1


def test_a_secret_comes_from_its_file_without_the_final_newline(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret\n")
    assert read_secret(tmp_path / "secret", "web.token_file") == "s3cret"
    with pytest.raises(SettingsInvalid, match=r"web\.token_file: cannot read"):
        read_secret(tmp_path / "absent", "web.token_file")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsInvalid, match="not UTF-8"):
        read_secret(tmp_path / "binary", "web.token_file")


def test_a_secret_from_the_environment_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMR_TOKEN", "s3cret")
    assert secret(file=None, env="EMR_TOKEN", key="fhir emr") == "s3cret"
    monkeypatch.delenv("EMR_TOKEN")
    with pytest.raises(SettingsInvalid, match="fhir emr: the environment variable EMR_TOKEN is not set"):
        secret(file=None, env="EMR_TOKEN", key="fhir emr")
    assert secret(file=None, env="", key="fhir emr") == ""


def test_the_database_url_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("postgresql://u:p@db/seggate\n")
    config = write_config(tmp_path, gateway=f'[database]\nurl_file = "{tmp_path / "url"}"')
    assert load_settings(config).database_url == "postgresql://u:p@db/seggate"
    assert load_settings(write_config(tmp_path / "b")).database_url.startswith("sqlite:///")


def test_relative_paths_start_above_the_configuration_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path)
    monkeypatch.chdir("/")
    settings = load_settings(config)
    assert settings.state_dir == tmp_path / "state"
    assert (settings.spool_dir, settings.models_dir) == (tmp_path / "state" / "spool", tmp_path / "state" / "models")


def test_completeness_is_the_senders_own_where_it_has_one(tmp_path: Path) -> None:
    senders = '[[senders]]\nae_title = "CT1"\ncompleteness = { quiet_s = 7 }\n[[senders]]\nae_title = "CT2"\n'
    settings = load_settings(write_config(tmp_path, gateway=senders))
    assert [settings.completeness_of(ae).quiet_s for ae in ("CT1", "CT2", "STRANGER")] == [7, 30, 30]


@pytest.mark.parametrize(("name", "model"), FILES)
def test_a_shipped_file_says_the_defaults(name: str, model: type[BaseModel]) -> None:
    assert model(**tomllib.loads((CONFIG / name).read_text(encoding="utf-8"))) == model()


@pytest.mark.parametrize(("name", "model"), FILES)
def test_a_shipped_file_is_valid_with_everything_uncommented(name: str, model: type[BaseModel]) -> None:
    model(**uncommented(CONFIG / name))


@pytest.mark.parametrize(("name", "model"), FILES)
def test_every_key_is_described_and_every_described_key_exists(name: str, model: type[BaseModel]) -> None:
    described, known = documented_keys(uncommented(CONFIG / name)), model_keys(model)
    if model is LoggingSettings:  # a table whose keys are the user's own
        described = {"loggers" if key.startswith("loggers.") else key for key in described}
    assert described - known == set()
    assert {key for key in known - described if not _described_elsewhere(key, described)} == set()


def _described_elsewhere(key: str, described: set[str]) -> bool:
    for own, common in DESCRIBED_AT.items():
        if key.startswith(own) and f"{common}{key.removeprefix(own)}" in described:
            return common == "completeness." or key.removeprefix(own) in COMMON
    return False


def test_the_shipped_folder_loads_as_it_is(tmp_path: Path) -> None:
    shutil.copytree(CONFIG, tmp_path / "config")
    settings = load_settings(tmp_path / "config")
    assert settings.gateway.senders == ()
    assert settings.destinations.all == ()
