"""The rules of the house, checked: style, types, layers, size, wording, dependencies, help texts."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from gateway.cli import app
from tests.support.peers import ROOT

PACKAGES = ("gateway", "engine", "storage", "fhir", "migrations")
MAX_LINES = 500
_OTHERS = {"node_modules", "__pycache__", "build", "dist"}  # what tools make, beside folders with a leading dot
_MADE_UP = ("demo-state", "state")
# Paths that exist on one person's machine only. What a server uses (/etc, /run, /var, /usr) is fine.
_PRIVATE_PATH = re.compile(r"(?<![\w.])/(?!home/somebody\b)(?:home|Users|root|work|tmp)/[\w.-]+|[A-Z]:\\Users")
_UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK)\b|\bfor now\b", re.IGNORECASE)
_FORBIDDEN_MODULES = {"dill", "cloudpickle", "marshal", "shelve", "joblib"}
_FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "pickle.load",
                    "pickle.loads", "pickle.Unpickler"}  # fmt: skip


def _tool(*command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """A tool of this environment, on the whole repository."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'fhir'}", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s
    )


def _files(suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files of the repository with one of these endings, without what tools and runs leave behind."""
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = sorted(
            s
            for s in subfolders
            if s not in _OTHERS and (not s.startswith(".") or s == ".ci") and Path(folder, s) != ROOT / "state"
        )
        if Path(folder).parent == ROOT and Path(folder).name in _MADE_UP:
            continue
        yield from (Path(folder, n) for n in sorted(names) if n.endswith(suffixes))


def _our_modules() -> list[Path]:
    return [p for p in _files((".py",)) if p.relative_to(ROOT).parts[0] in PACKAGES]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_ruff_finds_nothing() -> None:
    ran = _tool("-m", "ruff", "check", ".")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_ruff_would_reformat_nothing() -> None:
    ran = _tool("-m", "ruff", "format", "--check", ".")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_types_hold_under_mypy_strict() -> None:
    ran = _tool("-m", "mypy", timeout_s=1200)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_imports_go_one_way() -> None:
    ran = _tool("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 broken" in ran.stdout


def test_no_module_is_longer_than_500_lines() -> None:
    lengths = {_name(p): len(p.read_text(encoding="utf-8").splitlines()) for p in _our_modules()}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_no_module_is_named_for_what_it_is_not() -> None:
    assert [
        _name(p) for p in _our_modules() if p.stem in {"utils", "util", "helpers", "common", "manager", "base"}
    ] == []


def test_fhir_is_a_source_root_and_never_a_package() -> None:
    """The import name `fhir` belongs to fhir.resources."""
    assert not (ROOT / "fhir" / "__init__.py").exists()
    import fhir.resources  # the library's, although our folder has the same name

    assert not Path(fhir.resources.__file__).is_relative_to(ROOT / "fhir")


@pytest.mark.requirement("CARD-07")
def test_the_top_level_is_the_one_of_the_design_card() -> None:
    for name in ("gateway", "engine", "fhir", "storage", "migrations", "tests", "config", "docker", "README.md"):
        assert (ROOT / name).exists(), name


@pytest.mark.requirement("CARD-06")
def test_every_library_of_the_design_card_is_asked_for_and_used() -> None:
    """onnxruntime-gpu has the import name of onnxruntime."""
    imported = {
        name
        for path in _our_modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _imported(node)
    }
    for package, name in (
        ("pynetdicom", "pynetdicom"),
        ("pydicom", "pydicom"),
        ("highdicom", "highdicom"),
        ("fhir.resources", "fhir.resources"),
        ("torch", "torch"),
        ("onnxruntime-gpu", "onnxruntime"),
        ("SimpleITK", "SimpleITK"),
        ("sqlalchemy", "sqlalchemy"),
        ("apscheduler", "apscheduler"),
        ("orthanc-api-client", "orthanc_api_client"),
    ):
        assert package in _dependencies()
        assert any(i == name or i.startswith(f"{name}.") for i in imported), package


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (a.name for a in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module


def test_every_module_says_what_it_does() -> None:
    silent = [
        _name(p)
        for p in _our_modules()
        if p.name != "__init__.py" and not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_nothing_unfinished_and_no_path_of_one_machine() -> None:
    found = []
    for path in _files((".py", ".toml", ".md", ".yaml", ".yml", ".sh", ".service", ".txt", ".cfg", "Makefile", "run")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if _UNFINISHED.search(line) or _PRIVATE_PATH.search(line):
                found.append(f"{_name(path)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_nothing_runs_what_it_reads() -> None:
    """No pickle, no eval, no shell: weights, archives and headers come from strangers."""
    found: list[str] = []
    for path in _our_modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            line = f"{_name(path)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                found += [f"{line}: import {a.name}" for a in node.names if a.name in _FORBIDDEN_MODULES]
            elif isinstance(node, ast.ImportFrom):
                if (node.module or "") in _FORBIDDEN_MODULES | {"pickle"}:
                    found.append(f"{line}: from {node.module}")
            elif isinstance(node, ast.Call):
                found += [f"{line}: {fault}" for fault in _call_faults(node)]
    assert found == []


def _call_faults(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    said = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if name in _FORBIDDEN_CALLS:
        yield name
    if said.get("shell") == "True":
        yield f"{name} with a shell"
    if name == "torch.load" and said.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name in {"np.load", "numpy.load"} and said.get("allow_pickle") != "False":
        yield "np.load without allow_pickle=False"


def test_the_guard_against_running_what_is_read_sees_what_it_must() -> None:
    for source in (
        "eval(x)",
        "torch.load(x)",
        "np.load(x, allow_pickle=True)",
        "run(x, shell=True)",
        "pickle.loads(x)",
    ):
        call = ast.parse(source, mode="eval").body
        assert isinstance(call, ast.Call)
        assert list(_call_faults(call)), source


def _dependencies() -> list[str]:
    """Names in pyproject.toml, extras and build system included, in the spelling of that file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    return [re.split(r"[\[<>=~! ]", w)[0] for w in wanted]


def test_every_dependency_is_justified_and_every_justified_one_is_used() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    listed = {m.group(1).lower() for m in re.finditer(r"^\| `([^`]+)` \| .+\. \|$", text, re.MULTILINE)}
    wanted = {name.lower() for name in _dependencies()}
    assert wanted - listed == set(), "a row with one sentence in docs/dependencies.md is missing"
    assert listed - wanted == set(), "docs/dependencies.md explains what pyproject.toml does not ask for"


def test_every_term_of_the_glossary_appears_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^\| ([^|]+?) \| .+ \|$", text, re.MULTILINE)
    terms = [t.lower() for t in terms if t not in ("term", "---")]
    assert len(terms) > 40
    assert sorted(terms) == sorted(set(terms))


def test_links_between_our_documents_lead_somewhere() -> None:
    broken = []
    for path in _files((".md",)):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if not (path.parent / target).exists():
                broken.append(f"{_name(path)}: {target}")
    assert broken == []


def _commands(command: Any, name: str = "seggate") -> list[tuple[str, Any]]:
    """Each command with what is typed to run it; typer's own classes, whose names differ between its releases."""
    children = getattr(command, "commands", {})
    return [(name, command), *(c for child, found in children.items() for c in _commands(found, f"{name} {child}"))]


@pytest.mark.parametrize(
    ("name", "command"), [pytest.param(n, c, id=n) for n, c in _commands(typer.main.get_command(app))]
)
def test_every_command_and_option_has_help(name: str, command: Any) -> None:
    assert command.help, name
    for parameter in command.params:
        if parameter.name != "help":
            assert getattr(parameter, "help", None), f"{name}: {parameter.name}"
