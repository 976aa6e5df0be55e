"""engine.model_archive: a zip from a stranger."""

from __future__ import annotations

import stat
import struct
import zipfile
from pathlib import Path

import pytest

from engine import model_archive
from engine.errors import ImportRefused
from engine.model_archive import bundle_folder, unpack_model


def _zip(path: Path, *entries: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def _unpack(archive: Path, tmp_path: Path) -> list[str]:
    target = tmp_path / "target"
    target.mkdir(exist_ok=True)
    unpack_model(archive, target)
    return sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())


def test_only_what_an_import_reads_is_unpacked(tmp_path: Path) -> None:
    archive = _zip(
        tmp_path / "m.zip",
        ("D/T__P__c/plans.json", b"{}"),
        ("D/T__P__c/fold_0/checkpoint_final.pth", b"x"),
        ("D/T__P__c/fold_0/progress.png", b"x"),
        ("D/T__P__c/fold_0/evil.py", b"x"),
    )
    assert _unpack(archive, tmp_path) == ["D/T__P__c/fold_0/checkpoint_final.pth", "D/T__P__c/plans.json"]


@pytest.mark.parametrize(
    "name", ["../plans.json", "a/../../plans.json", "/plans.json", "a\\plans.json", "c:/plans.json"]
)
def test_path_that_leads_outside_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    archive = _zip(tmp_path / "m.zip", ("D/plans.json", b"{}"), (name, b"{}"))
    with pytest.raises(ImportRefused, match="plain relative path"):
        _unpack(archive, tmp_path)
    assert list((tmp_path / "target").rglob("*")) == []
    assert not (tmp_path / "plans.json").exists()


def test_link_is_refused(tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("D/plans.json")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(ImportRefused, match="link or a device"):
        _unpack(tmp_path / "m.zip", tmp_path)


def test_bomb_is_refused_by_its_ratio(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "m.zip", ("D/plans.json", b"\0" * 20_000_000))
    with pytest.raises(ImportRefused, match="would grow"):
        _unpack(archive, tmp_path)


def test_bomb_that_lies_about_its_size_is_bounded(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "m.zip", ("D/plans.json", b"\0" * 20_000_000))
    data = bytearray(archive.read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = struct.pack("<I", 1000)
    archive.write_bytes(bytes(data))
    with pytest.raises(ImportRefused, match="damaged"):
        _unpack(archive, tmp_path)
    assert sum(path.stat().st_size for path in (tmp_path / "target").rglob("*") if path.is_file()) <= 1000


def test_too_many_entries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_archive, "MAX_ENTRIES", 2)
    with pytest.raises(ImportRefused, match="3 entries"):
        _unpack(_zip(tmp_path / "m.zip", ("a", b""), ("b", b""), ("c", b"")), tmp_path)


def test_more_than_the_total_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_archive, "MAX_TOTAL_BYTES", 10)
    with pytest.raises(ImportRefused, match="12 bytes to unpack"):
        _unpack(_zip(tmp_path / "m.zip", ("a/plans.json", b"123456"), ("b/plans.json", b"123456")), tmp_path)


def test_name_that_appears_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("D/plans.json", b"{}")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("D/plans.json", b'{"a": 1}')
    with pytest.raises(ImportRefused, match="twice"):
        _unpack(tmp_path / "m.zip", tmp_path)


def test_damaged_content_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("D/plans.json", b"0123456789" * 10)
    data = (tmp_path / "m.zip").read_bytes().replace(b"0123456789", b"0123456788", 1)
    (tmp_path / "m.zip").write_bytes(data)
    with pytest.raises(ImportRefused, match="damaged"):
        _unpack(tmp_path / "m.zip", tmp_path)


def test_what_is_no_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.zip").write_bytes(b"not a zip")
    with pytest.raises(ImportRefused, match="not a zip"):
        _unpack(tmp_path / "m.zip", tmp_path)


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["bundle.json", "plans.json"], ""),
        (["m/bundle.json", "m/plans.json"], "m"),
        (["a/b/bundle.json"], None),
        (["mybundle.json", "m/plans.json"], None),
        (["a/bundle.json", "b/bundle.json"], None),
    ],
)
def test_a_bundle_in_a_zip_is_known_by_its_manifest(tmp_path: Path, names: list[str], folder: str | None) -> None:
    assert bundle_folder(_zip(tmp_path / "m.zip", *((name, b"{}") for name in names))) == folder


def test_what_is_no_zip_holds_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "m.zip").write_bytes(b"PK no zip")
    assert bundle_folder(tmp_path / "m.zip") is None


def test_of_a_bundle_everything_is_unpacked_and_checked_alike(tmp_path: Path) -> None:
    target = tmp_path / "all"
    target.mkdir()
    unpack_model(_zip(tmp_path / "m.zip", ("bundle.json", b"{}"), ("c/fold_0.onnx", b"x")), target, everything=True)
    assert (target / "c" / "fold_0.onnx").read_bytes() == b"x"
    with pytest.raises(ImportRefused, match="plain relative path"):
        unpack_model(_zip(tmp_path / "n.zip", ("bundle.json", b"{}"), ("../x", b"x")), target, everything=True)
