"""Folders that must not or cannot be written are refused before any work, with a remedy."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from shiftadd_cli.artifact import output
from shiftadd_cli.artifact.output import check_output, check_space, partial_folder
from shiftadd_cli.errors import OutputError
from shiftadd_cli.storage.refusals import refusals


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_usable_folders_are_accepted(tmp_path: Path, model: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("out", "a/b/c", "empty", "model-out"):
        check_output(tmp_path / name, model, overwrite=False, expected_bytes=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model"]


def test_an_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "shiftadd"}}))
    with pytest.raises(OutputError, match="add `overwrite=True`"):
        check_output(out, None, overwrite=False)
    check_output(out, None, overwrite=True)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "not json",
        "[]",
        "{}",
        '{"quantization_config": null}',
        '{"quantization_config": {"quant_method": "gptq"}}',
    ],
)
def test_overwriting_other_folders_is_refused(tmp_path: Path, content: str | None) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    if content is not None:
        (out / "config.json").write_text(content)
    with pytest.raises(OutputError, match="was not written by shiftadd"):
        check_output(out, None, overwrite=True)
    assert (out / "thesis.tex").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [("model", "is the model itself"), ("model/out", "is inside the model's folder"), (".", "is inside")],
)
def test_output_and_model_do_not_overlap(tmp_path: Path, model: Path, name: str, message: str, overwrite: bool) -> None:
    with pytest.raises(OutputError, match=message):
        check_output(tmp_path / name, model, overwrite=overwrite)


def test_links_are_followed(tmp_path: Path, model: Path) -> None:
    (tmp_path / "link").symlink_to(model, target_is_directory=True)
    with pytest.raises(OutputError, match="is inside the model's folder"):
        check_output(tmp_path / "link" / "out", model, overwrite=False)


def test_a_model_file_in_the_output_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("x")
    with pytest.raises(OutputError, match="is inside"):
        check_output(tmp_path, tmp_path / "m.gguf", overwrite=True)
    with pytest.raises(OutputError, match="is the model itself"):
        check_output(tmp_path / "m.gguf", tmp_path / "m.gguf", overwrite=True)


def test_files_in_the_way_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file; give a folder"):
        check_output(tmp_path / "file", None, overwrite=True)
    with pytest.raises(OutputError, match="is a file, so"):
        check_output(tmp_path / "file" / "out", None, overwrite=False)


def test_a_lack_of_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write everywhere, so the system's answer is replaced.
    monkeypatch.setattr(output.os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OutputError, match="No permission to write in"):
        check_output(tmp_path / "a" / "out", None, overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_real_lack_of_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="No permission to write in"):
        check_output(tmp_path / "out", None, overwrite=False)


def test_too_little_space_says_how_much(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OutputError, match=r"MB free and [\d,]+ MB are needed"):
        check_output(tmp_path / "out", None, overwrite=False, expected_bytes=2 * free + 10**9)


def test_space_of_an_unfinished_run_is_available_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = partial_folder(tmp_path / "out")
    partial.mkdir()
    (partial / "states").write_bytes(bytes(1_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    check_space(tmp_path / "out", 1_000_000)
    with pytest.raises(OutputError, match="MB are needed"):
        check_space(tmp_path / "out", 1_100_000)
    with pytest.raises(OutputError, match="MB are needed"):
        check_space(tmp_path / "other", 1_000_000)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "No space left"),
        (errno.EDQUOT, "No space left"),
        (errno.EACCES, "No permission"),
        (errno.EROFS, "No permission"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_system_errors_name_the_path_and_a_remedy(number: int, message: str) -> None:
    with (
        pytest.raises(OutputError, match=f"{message}.*/somewhere.*; .*choose another|/somewhere {message}.*; choose"),
        refusals(Path("/somewhere")),
    ):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass_through() -> None:
    with pytest.raises(ValueError, match="ours"), refusals(Path("/somewhere")):
        raise ValueError("ours")
