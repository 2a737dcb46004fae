"""Uploads, against a stand-in of the hub's HTTP API."""

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
    with running_hub() as found:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = write_checkpoint(tiny_model("llama"), tmp_path_factory.mktemp("models") / "out", tables=True).folder
    (found / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
    (found / ".cache").mkdir()
    (found / ".cache" / "other").write_text("not of the checkpoint")
    return found


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


def test_public_and_branches_are_as_asked(hub: Hub, folder: Path) -> None:
    for _ in range(2):
        result = push(folder, "team/tiny", "--public", "--revision", "3-bit")
        assert result.exit_code == 0, result.output
    repo = hub.repos["team/tiny"]
    assert repo["private"] is False
    assert repo["branches"] == {"main": {}, "3-bit": contents(folder)}


def test_an_upload_that_was_broken_off_goes_on(hub: Hub, folder: Path) -> None:
    hub.refuse_large = True
    result = push(folder, "tiny")
    assert result.exit_code == 2
    assert "The upload to tiny was interrupted" in result.stderr
    assert hub.repos["me/tiny"]["branches"]["main"] == {}
    hub.refuse_large = False
    assert push(folder, "tiny").exit_code == 0
    hub.sent.clear()
    assert push(folder, "tiny").exit_code == 0
    assert not [path for path in hub.sent if path.startswith("/large/")], "the hub has it"


def test_a_dry_run_sends_nothing(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = push(folder, "tiny", "--dry-run")
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in contents(folder))
    assert ".cache" not in result.stdout
    assert hub.sent == []


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "Uploading needs a hub token; log in with `hf auth login`, or set HF_TOKEN."),
        ("hf_unknown", "The hub does not accept the token"),
        (READ_ONLY, "The token may not write to tiny"),
    ],
)
def test_a_token_that_does_not_do_is_said(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, said: str
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    result = push(folder, "tiny")
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_a_hub_that_cannot_be_reached_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    result = push(folder, "tiny")
    assert result.exit_code == 2
    assert "The upload to tiny was interrupted" in result.stderr


def test_what_is_wrong_is_refused_before_anything_is_sent(hub: Hub, folder: Path, tmp_path: Path) -> None:
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
