"""The commands of the README on a tiny model, each as a user starts it: quantize, inspect, evaluate, load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny

QUICK = ["--samples", "4", "--seq-len", "64", "--group-size", "16"]


def shiftadd(*arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shiftadd_cli", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == expect, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)[:6]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("result") / "out"
    shiftadd("quantize", model, "-o", folder, "--bits", "4", *QUICK)
    return folder


def test_quantize_writes_a_verified_folder(out: Path) -> None:
    assert {"config.json", "report.json"} <= {path.name for path in out.iterdir()}
    shiftadd("inspect", out, "--verify")


def test_evaluate_reports_the_loss_of_quality(model: Path, out: Path, text: Path) -> None:
    options: list[str | Path] = ["--dataset", text, "--context", "64", "--max-tokens", "640", "--json"]
    compared = json.loads(shiftadd("evaluate", out, "--against", model, *options).stdout)
    alone = json.loads(shiftadd("evaluate", out, *options).stdout)
    measured = compared["models"][0]
    assert measured["perplexity"] == pytest.approx(alone["models"][0]["perplexity"], rel=1e-6)
    assert measured["kl"] > 0
    assert 0 < measured["agreement"] < 1


def test_transformers_loads_the_result(out: Path) -> None:
    program = (
        "import sys, shiftadd_cli\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].self_attn.q_proj).__name__)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(out)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "PackedLinear"


def test_same_command_gives_the_same_bytes(model: Path, out: Path, tmp_path: Path) -> None:
    shiftadd("quantize", model, "-o", tmp_path / "again", "--bits", "4", *QUICK)
    weights = sorted(path.name for path in out.glob("*.safetensors"))
    assert weights
    for name in weights:
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_existing_output_is_refused_and_left_alone(model: Path, out: Path) -> None:
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result = shiftadd("quantize", model, "-o", out, *QUICK, expect=2)
    assert "--overwrite" in result.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    shiftadd("quantize", model, "-o", tmp_path / "out", "--dry-run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "9"], "Option --bits"),
        (["--group-size", "0"], "Option --group-size"),
        (["--recipe", "defualt"], "did you mean 'default'"),
        (["--calibration", "none"], "sweep to none"),
    ],
)
def test_bad_options_are_refused_in_one_line_and_write_nothing(
    model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = shiftadd("quantize", model, "-o", tmp_path / "out", *arguments, expect=2)
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
