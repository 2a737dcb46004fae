"""Code that comes with a model is run by every verb that opens one when it is asked to, and by none otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from remote_models import MARK, save_remote_model
from stopped_runs import counting_text

import shiftadd_cli
from shiftadd_cli.cli import main
from shiftadd_cli.errors import ArtifactError

TRUST = "--trust-remote-code"
QUICK = ("--samples", "4", "--seq-len", "16", "--batch-size", "2", "--group-size", "16")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, a text, and what `quantize` makes of them."""
    folder = tmp_path_factory.mktemp("place")
    save_remote_model(folder / "model")
    counting_text(folder / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["quantize", "model", "-o", "out", "--recipe", "equal-bits", "--calibration", "text.txt", *QUICK]
        assert CliRunner().invoke(main, [*arguments, TRUST]).exit_code == 0
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "model", "-o", "new", "--recipe", "fast", "--calibration", "none"),
        ("allocate-bits", "model", "-o", "plan.json", "--avg-bits", "4", "--calibration", "text.txt", *QUICK),
        ("evaluate", "model", "--dataset", "text.txt", "--context", "16", "--max-tokens", "64"),
        ("evaluate", "out", "--dataset", "text.txt", "--context", "16", "--max-tokens", "64"),
        ("export", "out", "-o", "dense", "--format", "dense"),
        ("cost", "out"),
        ("report", "out"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_code_runs_when_it_is_asked_to_and_never_otherwise(
    place: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("SHIFTADD_CACHE", str(place / "cache"))
    (place / MARK).unlink(missing_ok=True)
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert f"runs only with {TRUST} (in Python: trust_remote_code=True)." in refused.output
    assert not (place / MARK).exists()
    taken = run(*arguments, TRUST)
    assert taken.exit_code == 0, taken.output


@pytest.mark.parametrize("verb", ["generate", "benchmark"])
def test_a_class_that_cannot_write_is_refused_by_name(place: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.chdir(place)
    options = {
        "generate": ("--prompt", "1 is", "--max-new-tokens", "2", "--no-chat"),
        "benchmark": ("--no-layers", "--rounds", "1", "--prompt-tokens", "4", "--new-tokens", "2"),
    }
    refused = run(verb, "out", *options[verb], TRUST)
    assert refused.exit_code == 2
    assert "MyModel has no method `generate`, so it cannot write" in refused.output
    assert "runs only with" in run(verb, "out", *options[verb]).output


def test_the_code_goes_with_the_checkpoint_and_the_export(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert run("export", "out", "-o", "dense-too", "--format", "dense", TRUST).exit_code == 0
    for folder in ("out", "dense-too"):
        for name in ("configuration_mine.py", "modeling_mine.py", "tokenizer.json"):
            assert (place / folder / name).read_bytes() == (place / "model" / name).read_bytes()
    tokens = torch.arange(8)[None]
    packed = shiftadd_cli.load("out", trust_remote_code=True)(tokens).logits
    decoded = shiftadd_cli.load("out", trust_remote_code=True).dequantize()(tokens).logits
    torch.testing.assert_close(packed, decoded, rtol=1e-4, atol=1e-4)


def test_python_does_not_run_the_code_unasked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (place / MARK).unlink(missing_ok=True)
    with pytest.raises(ArtifactError, match="trust_remote_code=True"):
        shiftadd_cli.load("out")
    assert not (place / MARK).exists()


def test_other_verbs_say_what_else_a_model_of_its_own_code_cannot(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    refused = run("export", "out", "-o", "gguf", "--format", "gguf", TRUST)
    assert refused.exit_code == 2
    assert "Models of type mine-alone cannot be written as GGUF" in refused.output
    assert run("inspect", "out", "--verify").exit_code == 0
