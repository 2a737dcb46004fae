"""Which set of pictures is which."""

from __future__ import annotations

import os
import shutil

from tiny_vision import save_pictures

from shiftadd_cli.data.images import load_images
from shiftadd_cli.data.images_data import spread


def fingerprint(spec):
    return load_images(str(spec), split="test").fingerprint


def test_a_folder_is_the_same_however_its_path_is_typed_and_wherever_it_lies(tmp_path, monkeypatch):
    folder = save_pictures(tmp_path / "set", 8, layout="folders")
    whole = fingerprint(folder)
    monkeypatch.chdir(tmp_path)
    assert fingerprint("set") == fingerprint("../" + tmp_path.name + "/set/") == whole
    shutil.copytree(folder, tmp_path / "elsewhere" / "other")
    assert fingerprint(tmp_path / "elsewhere" / "other") == whole
    os.symlink(folder, tmp_path / "link")
    assert fingerprint("link") == whole


def test_other_pictures_and_other_names_are_another_set(tmp_path):
    folder = save_pictures(tmp_path / "set", 4)
    found = {fingerprint(folder)}
    first, second = sorted(folder.iterdir())[:2]
    first.rename(first.with_name("zzz.png"))
    found.add(fingerprint(folder))
    second.write_bytes((folder / "zzz.png").read_bytes())
    found.add(fingerprint(folder))
    second.unlink()
    found.add(fingerprint(folder))
    assert len(found) == 4


def test_a_table_is_the_same_under_another_name(tmp_path):
    import pyarrow
    from pyarrow import parquet

    files = sorted(save_pictures(tmp_path / "set", 4).iterdir())
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "one.parquet")
    shutil.copy(tmp_path / "one.parquet", tmp_path / "other.parquet")
    assert fingerprint(tmp_path / "one.parquet") == fingerprint(tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"image": cells[::-1]}), tmp_path / "other.parquet")
    assert fingerprint(tmp_path / "one.parquet") != fingerprint(tmp_path / "other.parquet")


def test_a_few_of_many_are_spread_evenly():
    assert spread(5, None) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(9, 3) == [0, 4, 8]
    assert len(spread(1000, 256)) == 256
