"""Uploads to a stand-in for the hub's HTTP API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from artifacts import write_checkpoint
from click.testing import CliRunner, Result
from hub_stand_in import READ_ONLY, TOKEN, Hub, running_hub
from tiny_models import tiny_model

from shiftadd_cli.cli import main


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = write_checkpoint(tiny_model("llama"), tmp_path_factory.mktemp("models") / "out", tables=True).folder
    (checkpoint / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
    (checkpoint / ".cache").mkdir()
    (checkpoint / ".cache" / "other").write_text("not part of the checkpoint")
    return checkpoint


def push(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, ["push", *map(str, arguments)])
    assert TOKEN not in result.output
    assert READ_ONLY not in result.output
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_every_file_arrives_in_a_private_repository(hub: Hub, folder: Path) -> None:
    result = push(folder, "tiny", "--message", "First")
    assert result.exit_code == 0, result.output
    assert f"Uploaded      {hub.address}/me/tiny/commit/" in result.stdout
    repo = hub.repos["me/tiny"]
    assert repo["private"] is True
    assert repo["messages"] == ["First"]
    assert repo["branches"] == {"main": contents(folder)}


def test_visibility_and_branch_follow_the_options(hub: Hub, folder: Path) -> None:
    for _ in range(2):
        result = push(folder, "team/tiny", "--public", "--revision", "3-bit")
        assert result.exit_code == 0, result.output
    repo = hub.repos["team/tiny"]
    assert repo["private"] is False
    assert repo["branches"] == {"main": {}, "3-bit": contents(folder)}


def test_an_interrupted_upload_continues(hub: Hub, folder: Path) -> None:
    hub.refuse_large = True
    result = push(folder, "tiny")
    assert result.exit_code == 2
    assert "The upload to tiny was interrupted" in result.stderr
    assert hub.repos["me/tiny"]["branches"]["main"] == {}
    hub.refuse_large = False
    assert push(folder, "tiny").exit_code == 0
    hub.sent.clear()
    assert push(folder, "tiny").exit_code == 0
    assert not [path for path in hub.sent if path.startswith("/large/")], "the hub already has the large files"


def test_a_dry_run_sends_nothing(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = push(folder, "tiny", "--dry-run")
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in contents(folder))
    assert ".cache" not in result.stdout
    assert hub.sent == []


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "Uploading needs a hub token; log in with `hf auth login`, or set HF_TOKEN."),
        ("hf_unknown", "The hub does not accept the token"),
        (READ_ONLY, "The token may not write to tiny"),
    ],
)
def test_an_unusable_token_is_reported(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, message: str
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    result = push(folder, "tiny")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_an_unreachable_hub_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    result = push(folder, "tiny")
    assert result.exit_code == 2
    assert "The upload to tiny was interrupted" in result.stderr


def test_bad_names_and_checkpoints_are_refused_before_anything_is_sent(hub: Hub, folder: Path, tmp_path: Path) -> None:
    for name in ("a/b/c", "with space", "-x/y"):
        result = push(folder, "--", name)
        assert result.exit_code == 2
        assert "cannot be the name of a repository" in result.stderr
    result = push(tmp_path / "absent", "tiny")
    assert result.exit_code == 2
    broken = tmp_path / "broken"
    broken.mkdir()
    for name, content in contents(folder).items():
        (broken / name).write_bytes(content[:-1] if name.endswith(".safetensors") else content)
    result = push(broken, "tiny")
    assert result.exit_code == 2
    assert "quantize the model again" in result.stderr or "damaged" in result.stderr
    assert hub.sent == []
