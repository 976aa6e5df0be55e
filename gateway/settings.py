"""Configuration: `config/*.toml` read once into frozen, typed settings; unknown keys are errors.

Order of precedence: environment (`SEGGATE_<SECTION>__<KEY>`), then the file, then the defaults below.
Secrets are never in the files: a `..._file` key names a file and a `..._env` key an environment variable.
Every key is described in the commented files of `config/`; a test proves that both say the same.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from gateway.destination_settings import DestinationSettings
from gateway.learning_settings import LearningSettings
from gateway.setting_faults import DELIMITER, PREFIX, faults, unknown_variables, unreadable_variable
from gateway.setting_types import AeTitle, PeerAddress, Port, Seconds, Section
from gateway.settings_invalid import SettingsInvalid as SettingsInvalid

FILES = ("gateway.toml", "destinations.toml", "routes.toml", "learning.toml", "logging.toml")
T = TypeVar("T", bound=BaseModel)


class ReceiverSettings(Section):
    """[receiver] in gateway.toml: the DICOM listener."""

    ae_title: AeTitle = "SEGGATE"
    host: str = "0.0.0.0"  # noqa: S104 - scanners come from the network; the allow-list guards it
    port: Port = 11112
    check_called_ae: bool = True
    max_associations: int = Field(default=64, ge=1)
    max_pdu_bytes: int = Field(default=131072, ge=4096, le=1 << 20)
    acse_timeout_s: Seconds = 30
    dimse_timeout_s: Seconds = 60
    network_timeout_s: Seconds = 60
    drain_timeout_s: Seconds = 30
    unknown_sop_classes: Literal["refuse", "store"] = "refuse"
    reserve_mb: int = Field(default=2048, ge=0)
    conflict_policy: Literal["keep-first", "newest", "quarantine"] = "keep-first"


class Completeness(Section):
    """When a study counts as whole. `quiet_s` runs from the last object of the study."""

    quiet_s: Seconds = 30  # after the association was released
    quiet_open_s: Seconds = 300  # while no release was seen (aborted, lost, still open)
    give_up_s: Seconds = 7200  # declared whole with what is there, alarmed, gaps judged by the model's contract
    expected_count: Literal["off", "wait"] = "off"  # ask `query` how many instances the study has
    gap_check: bool = True  # slice gaps prolong the wait up to `quiet_open_s`


class SenderSettings(Section):
    """[[senders]] in gateway.toml: who may send, and how its studies are declared whole."""

    ae_title: AeTitle
    addresses: tuple[str, ...] = ()  # IP addresses or CIDR networks; empty = any address
    description: str = ""
    completeness: Completeness | None = None  # None = [completeness]
    query: PeerAddress | None = None  # answers C-FIND with the number of instances

    @model_validator(mode="after")
    def _networks(self) -> Self:
        import ipaddress

        for address in self.addresses:
            try:
                ipaddress.ip_network(address, strict=False)
            except ValueError as error:
                raise ValueError(f"addresses: {address!r} is neither an IP address nor a network") from error
        return self


class DatabaseSettings(Section):
    """[database]: SQLite file in the state folder by default, PostgreSQL by URL."""

    url: str = ""  # empty = sqlite in the state folder
    url_file: Path | None = None  # file that holds the URL (it may contain a password)
    pool_size: int = Field(default=5, ge=1)
    registry_url: str = ""  # MLflow's own database; empty = SQLite in the models folder


class WorkerSettings(Section):
    """[worker]: routing, inference, results."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=0, ge=0)  # 0 = all cores
    concurrency: int = Field(default=1, ge=1)  # inferences at a time in one worker
    trainings: int = Field(default=1, ge=0)  # folds at a time in one worker; 0 = this one does not train
    memory_budget_mb: int = Field(default=0, ge=0)  # 0 = what is free
    inference_deadline_s: Seconds = 3600  # a call that takes longer is ended and tried again
    attempts: int = Field(default=3, ge=1)  # then the result is parked
    poll_s: Annotated[float, Field(gt=0)] = 0.2
    heartbeat_s: Annotated[float, Field(gt=0)] = 5
    takeover_s: Annotated[float, Field(gt=0)] = 30  # a worker silent for so long is dead; another takes over


class WebSettings(Section):
    """[web]: health, readiness, metrics. Any address but loopback needs a token or client certificates."""

    host: str = "127.0.0.1"
    port: Port = 8080
    token_file: Path | None = None
    token_env: str = ""
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        loopback = self.host in {"127.0.0.1", "::1", "localhost"}
        if not loopback and not (self.token_file or self.token_env or self.client_ca):
            raise ValueError("host: an address beyond loopback needs token_file, token_env or client_ca")
        if self.client_ca and not (self.tls_certificate and self.tls_key):
            raise ValueError("client_ca: needs tls_certificate and tls_key as well")
        return self


# The checks that gateway/results/quality.py makes; docs/quality.md describes each.
QualityCheck = Literal[
    "empty",
    "volume",
    "border",
    "components",
    "laterality",
    "pair",
    "confidence",
    "fold-agreement",
    "mirror-agreement",
    "estimated-dice",
    "estimated-hd95",
    "calibrated-range",
    "source",
]


class QualitySettings(Section):
    """[quality]: what happens on a hold, and which checks are not made."""

    notice_on_hold: bool = False  # send an SR without measurements: "result held for review"
    disabled_checks: tuple[QualityCheck, ...] = ()


class SchedulerSettings(Section):
    """[scheduler]: cron lines (minute hour day month weekday); empty = never."""

    sweep_cron: str = "*/5 * * * *"  # outbox sweep, executor takeover, expired alarms
    drift_cron: str = "15 3 * * *"  # [drift]: each model's latest studies against its first
    learning_cron: str = "45 3 * * *"  # learning.toml: whether enough labelled cases wait for a fine-tuning
    retraining_cron: str = ""  # a full training of each model with its old and its labelled cases
    canary_cron: str = ""  # [canary]: a synthetic study through the real path
    retention_cron: str = "*/10 * * * *"  # [retention]: deletes what is delivered, where that says so


class DriftSettings(Section):
    """[drift]: which studies are compared with which (ART-20)."""

    reference_studies: int = Field(default=200, ge=60, le=10_000)  # the first of a model's version
    window_days: int = Field(default=30, ge=1, le=3650)  # the latest: at least 30 studies, at most half the reference


class CanarySettings(Section):
    """[canary]: synthetic studies of each model, sent to our own receiver (OPS-59). Their results leave the gateway to
    nobody."""

    ae_title: AeTitle = "SEGGATE_CANARY"  # calling; must not be one of [[senders]]
    result_within_s: Annotated[float, Field(gt=0)] = 900  # later is too slow
    min_dice: Annotated[float, Field(ge=0, le=1)] = 0.95  # of each label, against what the bundle says
    keep_days: int = Field(default=2, ge=0)  # then the synthetic studies are deleted


class RetentionSettings(Section):
    """[retention]: which studies are deleted by themselves (OPS-57). With its defaults none is.

    Only what is done with: delivered and looked up, or wanted by no model, and with no reason to stay
    (gateway/deletion/reasons_to_stay.py).
    """

    delivered_days: int = Field(default=0, ge=0)  # delivered so long ago: deleted; 0 = not for its age
    unmatched_days: int = Field(default=0, ge=0)  # the same for what no model wanted; 0 = never, for no reason
    start_below_mb: int = Field(default=0, ge=0)  # free space below which the longest delivered go; 0 = not for space
    stop_at_mb: int = Field(default=0, ge=0)  # until so much is free; 0 = 1.25 times start_below_mb
    keep_days: int = Field(default=7, ge=0)  # after delivery nothing goes so soon, however full the disk is
    stored_is_enough: bool = False  # destinations that cannot be asked: what they said they stored counts as delivered
    keep_unreviewed: bool = True  # QA said "review", and no reader has said anything
    keep_labelled: bool = True  # studies with a reader's labels that a training has learnt from

    @property
    def deletes(self) -> bool:
        return bool(self.delivered_days or self.unmatched_days or self.start_below_mb)

    @property
    def until_mb(self) -> int:
        """How much is to be free again."""
        return self.stop_at_mb or self.start_below_mb * 5 // 4

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.stop_at_mb and self.stop_at_mb < self.start_below_mb:
            raise ValueError(f"stop_at_mb: {self.stop_at_mb} is less than start_below_mb ({self.start_below_mb})")
        return self


LogLevel = Literal["debug", "info", "warning", "error"]


class LoggingSettings(Section):
    """logging.toml: structured lines on standard error, free of patient data at every level."""

    level: LogLevel = "info"
    format: Literal["console", "json"] = "console"
    loggers: dict[str, LogLevel] = Field(
        default={
            "pynetdicom": "error",
            "pydicom": "error",
            "highdicom": "error",
            "dbos": "warning",
            "alembic": "warning",
            "apscheduler": "warning",
            "httpx": "warning",
            "httpcore": "warning",
            "mlflow": "error",
            "uvicorn": "warning",
        }
    )


class GatewaySettings(BaseSettings):
    """gateway.toml."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=PREFIX, env_nested_delimiter=DELIMITER)

    state_dir: Path = Path("state")
    models_dir: Path | None = None  # None = <state_dir>/models
    spool_dir: Path | None = None  # None = <state_dir>/spool
    institution: str = ""
    receiver: ReceiverSettings = ReceiverSettings()
    senders: tuple[SenderSettings, ...] = ()
    completeness: Completeness = Completeness()
    late_window_s: Seconds = 86400  # late objects within this time make a new version of the study
    database: DatabaseSettings = DatabaseSettings()
    worker: WorkerSettings = WorkerSettings()
    quality: QualitySettings = QualitySettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    drift: DriftSettings = DriftSettings()
    canary: CanarySettings = CanarySettings()
    retention: RetentionSettings = RetentionSettings()
    web: WebSettings = WebSettings()

    @model_validator(mode="after")
    def _retention_keeps_the_reserve(self) -> Self:
        start, reserve = self.retention.start_below_mb, self.receiver.reserve_mb
        if start and start <= reserve:
            raise ValueError(
                f"retention.start_below_mb: {start} is not more than receiver.reserve_mb ({reserve}), below which "
                "nothing is accepted any more"
            )
        return self

    @model_validator(mode="after")
    def _canary_is_no_sender(self) -> Self:
        if self.canary.ae_title.strip() in {sender.ae_title.strip() for sender in self.senders}:
            raise ValueError(
                f"canary.ae_title: {self.canary.ae_title} is one of [[senders]]; what comes from it would be taken for "
                "a canary"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file (which arrives as init arguments)."""
        return env_settings, init_settings


class Settings(Section):
    """Everything from `config/`, plus where it was read from."""

    folder: Path
    gateway: GatewaySettings
    destinations: DestinationSettings
    learning: LearningSettings = LearningSettings()
    logging: LoggingSettings = LoggingSettings()

    @property
    def state_dir(self) -> Path:
        return self._resolved(self.gateway.state_dir)

    @property
    def spool_dir(self) -> Path:
        return self._resolved(self.gateway.spool_dir) if self.gateway.spool_dir else self.state_dir / "spool"

    @property
    def models_dir(self) -> Path:
        return self._resolved(self.gateway.models_dir) if self.gateway.models_dir else self.state_dir / "models"

    @property
    def routes_file(self) -> Path:
        return self.folder / "routes.toml"

    @property
    def database_url(self) -> str:
        database = self.gateway.database
        if database.url_file is not None:
            return read_secret(database.url_file, "database.url_file")
        return database.url or f"sqlite:///{self.state_dir / 'seggate.sqlite'}"

    def sender(self, calling_ae: str) -> SenderSettings | None:
        return next((s for s in self.gateway.senders if s.ae_title == calling_ae), None)

    def completeness_of(self, calling_ae: str) -> Completeness:
        sender = self.sender(calling_ae)
        return sender.completeness if sender and sender.completeness else self.gateway.completeness

    def located(self, path: Path) -> Path:
        """A path that another file of the configuration names, such as learning.toml."""
        return self._resolved(path)

    def _resolved(self, path: Path) -> Path:
        """Relative paths are relative to the folder above `config/`, wherever the command was started."""
        return path if path.is_absolute() else (self.folder.resolve().parent / path)


def read_secret(path: Path, key: str) -> str:
    """The content of a secret file without the final newline."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsInvalid(f"{key}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsInvalid(f"{key}: {path} is not UTF-8 text") from error


def secret(*, file: Path | None, env: str, key: str) -> str:
    """A secret from a file or an environment variable; empty when neither is configured."""
    if file is not None:
        value = read_secret(file, key)
        if not value:
            raise SettingsInvalid(f"{key}: {file} is empty")
        return value
    if env:
        value = os.environ.get(env, "")
        if not value:
            raise SettingsInvalid(f"{key}: the environment variable {env} is not set")
        return value
    return ""


def load_settings(folder: Path) -> Settings:
    """Read gateway.toml, destinations.toml, learning.toml and logging.toml from `folder`.

    Raises SettingsInvalid naming file and key, or environment variable, of every fault in all of them, a line each.
    """
    if not (folder / "gateway.toml").is_file():
        raise SettingsInvalid(
            f"{folder / 'gateway.toml'} does not exist; give the folder with --config or SEGGATE_CONFIG"
        )
    found: list[str] = []

    def part(kind: type[T], name: str) -> T | None:
        try:
            return _validated(kind, folder / name)
        except SettingsInvalid as error:
            found.append(str(error))
            return None

    gateway = part(GatewaySettings, "gateway.toml")
    destinations = part(DestinationSettings, "destinations.toml")
    learning = part(LearningSettings, "learning.toml")
    logging = part(LoggingSettings, "logging.toml")
    if gateway is None or destinations is None or learning is None or logging is None:
        raise SettingsInvalid("\n".join(found))
    secrets = {gateway.web.token_env, *(getattr(d, "token_env", "") for d in destinations.all)}
    if unknown := unknown_variables(GatewaySettings, variables(), secrets):
        raise SettingsInvalid("\n".join(unknown))
    return Settings(folder=folder, gateway=gateway, destinations=destinations, learning=learning, logging=logging)


def _validated(kind: type[T], path: Path) -> T:
    """The settings of a file, which may be absent; gateway.toml's with the environment."""
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except OSError as error:
        raise SettingsInvalid(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"{path}: not valid TOML: {error}") from error
    try:
        return kind(**table)
    except SettingsError as error:
        raise SettingsInvalid(unreadable_variable(error, variables())) from error
    except ValidationError as error:
        used = variables() if kind is GatewaySettings else []
        raise SettingsInvalid("\n".join(faults(error, kind, str(path), used))) from error


def variables() -> list[str]:
    """Names of the `SEGGATE_…` variables that are set."""
    return [name for name in os.environ if name.upper().startswith(PREFIX)]
