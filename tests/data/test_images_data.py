"""Fingerprints tell sets of pictures apart."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tiny_vision import save_pictures

from shiftadd_cli.data.images import load_images
from shiftadd_cli.data.images_data import spread


def fingerprint(spec: str | Path) -> str:
    return load_images(str(spec), split="test").fingerprint


def test_a_folders_fingerprint_does_not_depend_on_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_pictures(tmp_path / "set", 8, layout="folders")
    expected = fingerprint(folder)
    monkeypatch.chdir(tmp_path)
    assert fingerprint("set") == fingerprint("../" + tmp_path.name + "/set/") == expected
    shutil.copytree(folder, tmp_path / "elsewhere" / "other")
    assert fingerprint(tmp_path / "elsewhere" / "other") == expected
    os.symlink(folder, tmp_path / "link")
    assert fingerprint("link") == expected


def test_changed_pictures_and_names_change_the_fingerprint(tmp_path: Path) -> None:
    folder = save_pictures(tmp_path / "set", 4)
    fingerprints = {fingerprint(folder)}
    first, second = sorted(folder.iterdir())[:2]
    first.rename(first.with_name("zzz.png"))
    fingerprints.add(fingerprint(folder))
    second.write_bytes((folder / "zzz.png").read_bytes())
    fingerprints.add(fingerprint(folder))
    second.unlink()
    fingerprints.add(fingerprint(folder))
    assert len(fingerprints) == 4


def test_a_tables_fingerprint_does_not_depend_on_its_name(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    files = sorted(save_pictures(tmp_path / "set", 4).iterdir())
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "one.parquet")
    shutil.copy(tmp_path / "one.parquet", tmp_path / "other.parquet")
    assert fingerprint(tmp_path / "one.parquet") == fingerprint(tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"image": cells[::-1]}), tmp_path / "other.parquet")
    assert fingerprint(tmp_path / "one.parquet") != fingerprint(tmp_path / "other.parquet")


def test_a_selection_is_evenly_spread() -> None:
    assert spread(5, None) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(9, 3) == [0, 4, 8]
    assert len(spread(1000, 256)) == 256
