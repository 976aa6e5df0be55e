"""The files of docker/: they take the steps of `make install`, name only settings that exist, and ask for no rights."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.main import get_command

from gateway import cli, command_options, heartbeat, metrics
from gateway.intake.routing_rules import parse_rules
from gateway.probe import CALLING_AE_TITLE, PROBES
from gateway.settings import GatewaySettings, Settings, load_settings
from gateway.supervisor import PROCESSES
from tests.support.peers import ROOT

DOCKER = ROOT / "docker"
KUBERNETES = DOCKER / "kubernetes"
OURS = ("Dockerfile.gateway", "Dockerfile.worker")
DOCKERFILES = (*OURS, "pacs/Dockerfile", "emr/Dockerfile")
SEGGATE_SERVICES = ("receiver", "worker", "services")
# Read by the program itself rather than from gateway.toml; each is checked against the source that reads it.
OTHER_VARIABLES = {"SEGGATE_CONFIG": command_options, "SEGGATE_EXECUTOR": heartbeat}


@dataclass
class Stage:
    """One `FROM … AS …` with what follows it."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [text for word, text in self.instructions if word == instruction]


def stages(path: Path) -> list[Stage]:
    found: list[Stage] = []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        word, text = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = text.partition(" AS ")
            found.append(Stage(base=base, name=name or str(len(found))))
        else:
            found[-1].instructions.append((word, text.strip()))
    return found


def commands(stage: Stage) -> list[list[str]]:
    return [shlex.split(part) for run in stage.all("RUN") for part in run.split("&&")]


@dataclass(frozen=True)
class PipInstall:
    constraints: tuple[str, ...]
    project: str
    extras: frozenset[str]
    options: frozenset[str]


def pip_install(words: list[str]) -> PipInstall:
    """What `…/python -m pip install …` installs; fails for anything but this project with one constraints file."""
    assert words[0].endswith("/bin/python"), words
    assert words[1:4] == ["-m", "pip", "install"], words
    rest, constraints, options = words[4:], [], set()
    targets = []
    while rest:
        word = rest.pop(0)
        if word == "-c":
            constraints.append(rest.pop(0))
        elif word.startswith("-"):
            options.add(word)
        else:
            targets.append(word)
    assert len(targets) == 1, f"one project, nothing beside it: {words}"
    match = re.fullmatch(r"(\.)(?:\[([a-z,]+)\])?", targets[0])
    assert match, targets[0]
    extras = frozenset(match[2].split(",")) if match[2] else frozenset()
    return PipInstall(tuple(constraints), match[1], extras, frozenset(options))


def make_install(runtime: str) -> list[list[str]]:
    """The commands of `make install` on a machine with that runtime, as make itself expands them."""
    answer = subprocess.run(
        ["make", "-n", "install", f"RUNTIME={runtime}", "VENV=/nowhere/venv", "EXTRAS="],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    parts = [part for line in answer.stdout.splitlines() for part in line.split("||")]
    return [words for part in parts if (words := shlex.split(part)) and words[0].endswith(("python", "python3"))]


@pytest.mark.requirement("ART-17", open="the images are not built here; autoscaling is not measured on a cluster")
@pytest.mark.parametrize(("file", "runtime"), [("Dockerfile.gateway", "cpu"), ("Dockerfile.worker", "gpu")])
def test_every_install_step_of_an_image_is_one_of_make_install(file: str, runtime: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not on the PATH")
    ours = make_install(runtime)
    make_pip = [pip_install(w) for w in ours if w[1:3] == ["-m", "pip"]]
    make_venv = [w for w in ours if w[1:3] == ["-m", "venv"]]
    assert len(make_pip) == 1
    assert len(make_venv) == 1
    seen = []
    for stage in stages(DOCKER / file):
        for words in commands(stage):
            if words[1:3] == ["-m", "venv"]:
                assert [words[0], *words[1:3]] == make_venv[0][:3]
                assert words[3] == "/opt/seggate"
            elif "pip" in words:
                step = pip_install(words)
                assert step.constraints == make_pip[0].constraints
                assert step.project == make_pip[0].project
                assert step.extras <= make_pip[0].extras, "an image may have less, never more"
                # An image holds a copy of the code instead of a link to the checkout, and no download cache.
                assert step.options == make_pip[0].options - {"-e"} | {"--no-cache-dir"}
                seen.append(step)
            elif words[0] == "apt-get":
                # Python itself is what `make install` finds on the machine.
                packages = {w for w in words[2:] if not w.startswith("-")}
                assert packages <= {"python3", "python3-venv"}, words
            else:
                assert words[0] in {"useradd", "install", "rm"}, f"{file}: an unknown step: {words}"
    assert seen


def test_images_hold_neither_torch_nor_more_runtime_than_they_need() -> None:
    def extras(file: str, name: str) -> set[frozenset[str]]:
        by_name = {s.name: s for s in stages(DOCKER / file)}
        sources = [
            by_name[name],
            *(by_name[m[1]] for m in re.finditer(r"--from=(\S+)", str(by_name[name].all("COPY")))),
        ]
        return {pip_install(w).extras for s in sources for w in commands(s) if "pip" in w}

    assert extras("Dockerfile.gateway", "gateway") == {frozenset()}
    assert extras("Dockerfile.gateway", "worker-cpu") == {frozenset({"cpu"})}
    assert extras("Dockerfile.worker", "worker") == {frozenset({"gpu"})}


@pytest.mark.parametrize("file", DOCKERFILES)
def test_base_images_are_pinned_and_the_user_is_not_root(file: str) -> None:
    found = stages(DOCKER / file)
    names = {s.name for s in found}
    for stage in found:
        if stage.base in names:
            continue
        image, _, tag = stage.base.partition(":")
        assert re.search(r"\d+\.\d+", tag), f"{file}: {image} is not pinned to a version: {tag!r}"
    last = found[-1]
    lineage = [last, *(s for s in found if s.name == last.base)]
    users = [user for stage in lineage for user in stage.all("USER")]
    assert users
    assert all(re.fullmatch(r"[1-9]\d+:[1-9]\d+", user) for user in users), "numeric, so that a cluster can check it"
    assert any(text.split("CMD")[0] != text for text in last.all("HEALTHCHECK")), f"{file}: no health check"


@pytest.mark.parametrize("file", OURS)
def test_what_an_image_copies_exists_and_passes_its_dockerignore(file: str) -> None:
    let_in = {
        line[1:]
        for line in (DOCKER / f"{file}.dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    copied = set()
    for stage in stages(DOCKER / file):
        for text in stage.all("COPY"):
            if not text.startswith("--from="):
                copied.update(text.split()[:-1])
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)
    build = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.search(r"\[tool\.hatch\.build\.targets\.wheel\]\npackages = \[(.*?)\]", build)
    assert packages
    wanted = {name.split("/")[0] for name in re.findall(r'"([^"]+)"', packages[1])}
    assert wanted <= copied, "all that the wheel is made of"


@pytest.mark.parametrize("file", OURS)
def test_an_image_starts_a_command_and_a_probe_that_exist(file: str) -> None:
    for stage in stages(DOCKER / file):
        for text in stage.all("CMD"):
            check_arguments(json.loads(text))
        for text in stage.all("HEALTHCHECK"):
            check_probe(json.loads(text.split("CMD", 1)[1]))


def check_arguments(words: list[str]) -> None:
    """`seggate` has this command with these options, and the roles exist."""
    command = get_command(cli.app)
    name, *rest = words
    context = command.make_context("seggate", [name, *rest], resilient_parsing=True)
    sub = command.get_command(context, name)  # type: ignore[attr-defined]
    assert sub is not None, f"seggate has no command {name}"
    options = {option for parameter in sub.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= options
    if "--roles" in rest:
        roles = rest[rest.index("--roles") + 1].split(",")
        assert set(roles) <= set(PROCESSES)


def check_probe(words: list[str]) -> None:
    assert words[:3] == ["python", "-m", "gateway.probe"]
    assert set(words[3:]) <= set(PROBES)
    assert words[3:]


def setting_exists(path: list[str], kind: type[BaseModel] = GatewaySettings) -> bool:
    info = kind.model_fields.get(path[0])
    if info is None:
        return False
    if len(path) == 1:
        return True
    inner = info.annotation
    return isinstance(inner, type) and issubclass(inner, BaseModel) and setting_exists(path[1:], inner)


def check_environment(names: list[str]) -> None:
    for name in names:
        if name in OTHER_VARIABLES:
            source = OTHER_VARIABLES[name].__file__
            assert source
            assert name in Path(source).read_text(encoding="utf-8")
        elif name.startswith("SEGGATE_"):
            path = name.removeprefix("SEGGATE_").lower().split("__")
            assert setting_exists(path), f"{name}: gateway.toml has no such key"


def test_the_check_of_variables_knows_what_does_not_exist() -> None:
    assert setting_exists(["database", "registry_url"])
    assert not setting_exists(["database", "registri_url"])
    assert not setting_exists(["state_dir", "x"])


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    return read


@pytest.mark.requirement("ART-17", open="the images are not built here; autoscaling is not measured on a cluster")
def test_compose_services_have_no_rights_and_a_health_check(compose: dict[str, Any]) -> None:
    assert {*SEGGATE_SERVICES, "pacs", "emr", "database"} == set(compose["services"])
    for name, service in compose["services"].items():
        assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", service["user"]), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert any(entry.startswith("/tmp:") for entry in service["tmpfs"]), name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert not {"privileged", "network_mode", "pid", "cap_add", "devices"} & set(service), name
        assert re.search(r":\d+\.\d+", service["image"]), name


def test_compose_services_of_ours_name_what_exists(compose: dict[str, Any]) -> None:
    roles: list[str] = []
    for name in SEGGATE_SERVICES:
        service = compose["services"][name]
        check_arguments(service["command"])
        roles += service["command"][2].split(",")
        check_probe(service["healthcheck"]["test"][1:])
        check_environment(list(service["environment"]))
        assert "./config:/etc/seggate:ro" in service["volumes"]
        assert service["hostname"], "the executor's id is made of it"
    assert sorted(roles) == sorted(PROCESSES), "every role runs once"


def test_compose_builds_from_files_that_exist(compose: dict[str, Any]) -> None:
    gpu = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text(encoding="utf-8"))
    services = [*compose["services"].values(), *gpu["services"].values()]
    assert set(gpu["services"]) <= set(compose["services"])
    built = [service["build"] for service in services if "build" in service]
    assert len(built) == 6
    for build in built:
        file = (DOCKER / build["context"] / build.get("dockerfile", "Dockerfile")).resolve()
        assert file.is_file(), file
        if "target" in build:
            assert build["target"] in {s.name for s in stages(file)}


def test_compose_keeps_the_three_places_of_state_in_volumes(compose: dict[str, Any]) -> None:
    assert {"spool", "database", "models"} <= set(compose["volumes"])
    for name in SEGGATE_SERVICES:
        mounted = dict(entry.split(":")[:2] for entry in compose["services"][name]["volumes"])
        assert mounted["spool"] == "/var/lib/seggate/spool"
        assert mounted["models"] == "/var/lib/seggate/models"
    assert any(entry.startswith("database:") for entry in compose["services"]["database"]["volumes"])
    entries = [entry for service in compose["services"].values() for entry in service.get("volumes", [])]
    used = {entry.split(":")[0] for entry in entries if not entry.startswith(".")}
    assert used == set(compose["volumes"])
    assert all((DOCKER / entry.split(":")[0]).exists() for entry in entries if entry.startswith("."))


def test_compose_secrets_are_files_that_make_secrets_makes(compose: dict[str, Any], tmp_path: Path) -> None:
    shutil.copy(DOCKER / "make-secrets.sh", tmp_path)
    for _ in range(2):
        subprocess.run(["sh", str(tmp_path / "make-secrets.sh")], check=True, capture_output=True, timeout=30)
    made = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "secrets").iterdir()}
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    for name, secret in compose["secrets"].items():
        assert secret["file"] == f"./secrets/{name}"
        assert made[name]
    assert made["database-password"] in made["database-url"], "the second run keeps what the first made"
    assert made["web-token"] != made["database-password"]
    assert json.loads(made["pacs-users.json"])["RegisteredUsers"]["seggate"] == made["pacs-password"]
    named = {
        entry if isinstance(entry, str) else entry["source"]
        for service in compose["services"].values()
        for entry in service.get("secrets", [])
    }
    assert named == set(compose["secrets"])
    for service in compose["services"].values():
        for key in service.get("environment", {}):
            assert key.endswith("_FILE") or "PASSWORD" not in key, "a secret is a file"
    assert (DOCKER / ".gitignore").read_text(encoding="utf-8").split() == ["/secrets/"]


def check_configuration(folder: Path, *, secrets: set[str]) -> Settings:
    """Loads as the program does; its routes are valid, the probe may call, and every secret is one that is mounted."""
    settings = load_settings(folder)
    assert parse_rules(settings.routes_file.read_text(encoding="utf-8")).rules
    probe = settings.sender(CALLING_AE_TITLE)
    assert probe is not None
    assert probe.addresses == ("127.0.0.1",), "nobody else may use the probe's name"
    assert settings.gateway.database.url_file is not None
    assert settings.gateway.web.token_file is not None
    for path in (settings.gateway.database.url_file, settings.gateway.web.token_file):
        assert str(path) in secrets
    return settings


def test_compose_configuration_loads_and_fits_the_services(compose: dict[str, Any]) -> None:
    secrets = {f"/run/secrets/{name}" for name in compose["services"]["receiver"]["secrets"]}
    settings = check_configuration(DOCKER / "config", secrets=secrets)
    ports = {name: [p.split(":") for p in compose["services"][name]["ports"]] for name in ("receiver", "services")}
    assert ports["receiver"] == [["11112", str(settings.gateway.receiver.port)]]
    assert ports["services"] == [["127.0.0.1", "8080", str(settings.gateway.web.port)]], "loopback of the host only"
    hosts = {d.host for d in settings.destinations.dimse}
    hosts |= {re.sub(r"^https?://([^:/]+).*", r"\1", d.url) for d in settings.destinations.fhir}
    assert hosts == {"pacs", "emr"} <= set(compose["services"])
    orthanc = json.loads((DOCKER / "pacs" / "orthanc.json").read_text(encoding="utf-8"))
    archive = settings.destinations.dimse[0]
    assert (archive.ae_title, archive.port) == (orthanc["DicomAet"], orthanc["DicomPort"])
    assert orthanc["DicomModalities"]["seggate"]["AET"] == settings.gateway.receiver.ae_title
    assert settings.sender(orthanc["DicomAet"]) is not None, "a study can be sent on from the archive"
    subnet = compose["networks"]["hospital"]["ipam"]["config"][0]["subnet"]
    sender = settings.sender("PACS")
    assert sender is not None
    assert sender.addresses == (subnet,)


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(KUBERNETES.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield path.name, document


def pods() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(d, d["spec"]["template"]) for _, d in manifests() if d["kind"] in {"Deployment", "StatefulSet"}]


@pytest.mark.requirement("ART-17", open="the images are not built here; autoscaling is not measured on a cluster")
def test_kubernetes_pods_are_restricted_and_name_what_exists() -> None:
    found = pods()
    assert {d["metadata"]["name"] for d, _ in found} == set(SEGGATE_SERVICES)
    roles: list[str] = []
    for workload, template in found:
        spec = template["spec"]
        assert workload["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        volumes = {v["name"] for v in spec["volumes"]}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            check_arguments(container["args"])
            roles += container["args"][2].split(",")
            check_environment([e["name"] for e in container["env"]])
            for kind in ("startupProbe", "livenessProbe"):
                check_probe(container[kind]["exec"]["command"])
            mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
            assert set(mounts) == volumes
            assert (mounts["spool"], mounts["models"]) == ("/var/lib/seggate/spool", "/var/lib/seggate/models")
    assert sorted(roles) == sorted(PROCESSES)


def test_kubernetes_executors_keep_their_names_and_the_spool_has_one_indexer() -> None:
    kinds = {d["metadata"]["name"]: d for d, _ in pods()}
    assert kinds["worker"]["kind"] == kinds["services"]["kind"] == "StatefulSet"
    assert kinds["receiver"]["spec"]["replicas"] == 1
    assert kinds["receiver"]["spec"]["strategy"] == {"type": "Recreate"}
    named = {d["metadata"]["name"] for _, d in manifests() if d["kind"] == "Service"}
    assert all(d["spec"]["serviceName"] in named for d in kinds.values() if d["kind"] == "StatefulSet")


def test_kubernetes_configuration_loads(tmp_path: Path) -> None:
    (configuration,) = [d for _, d in manifests() if d["kind"] == "ConfigMap"]
    for name, text in configuration["data"].items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    mounted = {f"/run/secrets/seggate/{key}" for key in ("database-url", "web-token", "registry-url")}
    settings = check_configuration(tmp_path, secrets=mounted)
    for workload, template in pods():
        for container in template["spec"]["containers"]:
            for port in container.get("ports", []):
                expected = {"dicom": settings.gateway.receiver.port, "web": settings.gateway.web.port}[port["name"]]
                assert port["containerPort"] == expected, workload["metadata"]["name"]


def test_kustomization_lists_every_manifest_but_the_optional_one() -> None:
    (listed,) = [d["resources"] for _, d in manifests() if d["kind"] == "Kustomization"]
    there = {p.name for p in KUBERNETES.glob("*.yaml")}
    assert set(listed) == there - {"kustomization.yaml", "autoscaling.yaml"}


def unit_file(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("=", 1)) for line in lines if "=" in line and not line.startswith("#")]  # type: ignore[misc]


@pytest.mark.requirement("ART-17", open="the images are not built here; autoscaling is not measured on a cluster")
def test_the_systemd_unit_starts_a_command_that_exists_without_rights() -> None:
    lines = unit_file(DOCKER / "seggate.service")
    unit = dict(lines)
    program, *words = shlex.split(unit["ExecStart"])
    assert program.endswith("/bin/seggate")
    check_arguments(words)
    environment = [value.split("=")[0] for key, value in lines if key == "Environment"]
    check_environment(environment)
    assert "SEGGATE_STATE_DIR" in environment
    for key, value in {
        "User": "seggate",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
        "StateDirectory": "seggate",
        "Restart": "on-failure",
        "KillMode": "mixed",
    }.items():
        assert unit[key] == value, key
    drain_s = GatewaySettings.model_fields["receiver"].default.drain_timeout_s
    assert float(unit["TimeoutStopSec"]) > drain_s + 10, "the supervisor waits so long for its processes"


def test_operations_lists_every_metric_and_no_other() -> None:
    source = Path(metrics.__file__ or "").read_text(encoding="utf-8")
    exposed = set(re.findall(r'GaugeMetricFamily\(\s*"(seggate_\w+)"', source))
    exposed |= {f"{name}_total" for name in re.findall(r'CounterMetricFamily\(\s*"(seggate_\w+)"', source)}
    listed = set(re.findall(r"`(seggate_\w+)`", (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")))
    assert listed == exposed


def test_the_documents_name_files_and_settings_that_exist() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:docker|docs|config)/[\w./-]+)`", operations):
        assert (ROOT / name).exists(), name
    for section, key in re.findall(r"`([a-z]+)\.([a-z_]+)`", operations):
        if section in GatewaySettings.model_fields:
            assert setting_exists([section, key]), f"{section}.{key}"
    readme = (DOCKER / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"^\| (.+?) \|", readme, flags=re.MULTILINE):
        for file in re.findall(r"`([^`]+)`", name):
            assert (DOCKER / file).exists(), file
