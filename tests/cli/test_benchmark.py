"""`shiftadd benchmark` as a user types it; no test here requires a certain speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from artifacts import write_checkpoint
from click.testing import CliRunner, Result
from tiny_models import save_tiny, tiny_model, tiny_tokenizer
from tiny_vision import IMAGE_SIZE, save_tiny_vision, tiny_vision_model, write_processor

from shiftadd_cli.benchmark import layer_speed, run
from shiftadd_cli.cli import main
from shiftadd_cli.runtime.opened import Opened

SHORT = ("--rounds", "2", "--prompt-tokens", "6,3", "--new-tokens", "4")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("models") / "original"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_checkpoint(tiny_model("llama"), tmp_path_factory.mktemp("models") / "packed", tables=True).folder
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read little memory, and take short samples."""
    monkeypatch.setattr(run, "roof_bytes", lambda cache, free: 1 << 20)
    monkeypatch.setattr(layer_speed, "_MOST_COPIES", 4)
    monkeypatch.setattr(layer_speed, "SAMPLE_SECONDS", 1e-4)


def benchmark(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["benchmark", *arguments])


def test_models_and_layers_are_shown_in_tables(packed: str, original: str) -> None:
    result = benchmark(packed, "--against", original, *SHORT)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split("  ")[-1].strip() == "original, float32"
    assert [line for line in lines if line.startswith("decode, tokens/s")]
    assert [line for line in lines if line.startswith("prefill of 6")]
    assert [line for line in lines if line.startswith("gate_proj/up_proj, 100 x 48, 3 bits, apot2, 1 x 16")]
    assert "prompts of 3, 6 tokens, 4 new ones" in result.stdout
    for stage in ("Loading", "Running", "Layers"):
        assert f"{stage}: " in result.stderr
        assert f"{stage}: " not in result.stdout


def test_standard_output_holds_only_the_json(packed: str, original: str) -> None:
    result = benchmark(packed, "--against", original, "--json", "--dtype", "bfloat16", "--batch", "2", *SHORT)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [entry["name"] for entry in document["models"]] == [f"{packed} in bfloat16", f"{original} in float32"]
    assert (document["batch"], document["rounds"], document["new_tokens"], document["prompt_tokens"]) == (
        2,
        2,
        4,
        [3, 6],
    )
    gains = document["gains"][f"{original} in float32"]
    assert gains.keys() == {"decode", "prefill of 3", "prefill of 6", "load", "weights in memory", "size on disk"}
    assert gains["size on disk"]["median"] > 1
    first = document["models"][0]
    assert len(first["tokens_per_second"]["decode"]["rounds"]) == 2
    assert first["times"]["prefill of 6"]["amount"] == 12
    assert first["times"]["decode"]["amount"] == 6
    assert document["roof"]["bytes_per_second"] > 0
    layers = {"/".join(name.rpartition(".")[2] for name in entry["names"]): entry for entry in document["layers"]}
    assert list(layers) == ["q_proj/o_proj", "k_proj/v_proj", "gate_proj/up_proj", "down_proj", "lm_head"]
    assert layers["down_proj"]["dtype"] == "bfloat16"
    assert layers["down_proj"]["ways"].keys() == {"compressed", "float32", "bfloat16"}


def test_layers_can_be_left_out(packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure_layers", lambda *_, **__: pytest.fail("layers were measured"))
    result = benchmark(packed, "--no-layers", *SHORT)
    assert result.exit_code == 0, result.output
    assert "down_proj" not in result.stdout
    assert "Memory" not in result.stdout


def test_original_can_be_measured_alone(original: str) -> None:
    result = benchmark(original, *SHORT)
    assert result.exit_code == 0, result.output
    assert "none: the model has no compressed linear layer" in result.stdout


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_vision("vit", tmp_path_factory.mktemp("models") / "vit"))


def test_vision_models_are_measured_on_images(vision: str, tmp_path: Path) -> None:
    packed = write_checkpoint(tiny_vision_model("vit"), tmp_path / "packed").folder
    write_processor(packed)
    result = benchmark(str(packed), "--against", vision, "--json", "--rounds", "2")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["batches"], document["image"]) == ([1, 16], [3, IMAGE_SIZE, IMAGE_SIZE])
    assert document["models"][0]["images_per_second"].keys() == {"batch of 1", "batch of 16"}
    assert document["layers"]
    result = benchmark(vision, "--batch", "3", "--rounds", "1", "--no-layers")
    assert result.exit_code == 0, result.output
    assert [line for line in result.stdout.splitlines() if line.startswith("batch of 3, images/s")]


@pytest.mark.parametrize("option", ["--prompt-tokens=3", "--new-tokens=4"])
def test_prompt_lengths_are_refused_for_a_vision_model(vision: str, option: str) -> None:
    result = benchmark(vision, option)
    assert result.exit_code == 2
    assert "reads no prompt" in result.stderr


def test_vision_model_beside_a_language_model_is_refused(vision: str, original: str) -> None:
    result = benchmark(vision, "--against", original)
    assert result.exit_code == 2
    assert "one reads images" in result.stderr


def test_models_with_different_image_sizes_are_refused(vision: str, tmp_path: Path) -> None:
    other = save_tiny_vision("vit", tmp_path / "other")
    write_processor(other, size=IMAGE_SIZE // 2)
    result = benchmark(vision, "--against", str(other))
    assert result.exit_code == 2
    assert "images of other sizes" in result.stderr


BAD = {
    "no model": ([], "Missing argument 'OUT'"),
    "missing model": (["/nowhere/at/all"], "There is no model at /nowhere/at/all"),
    "missing original": (["{packed}", "--against", "/nowhere"], "There is no model at /nowhere"),
    "no number": (["{packed}", "--prompt-tokens", "12,x"], "'12,x' is not a list of positive integers"),
    "no tokens": (["{packed}", "--prompt-tokens", "0"], "'0' is not a list of positive integers"),
    "too long": (["{packed}", "--prompt-tokens", "5000"], "beyond the context of 512 tokens"),
    "too many": (["{packed}", "--new-tokens", "5000"], "beyond the context of 512 tokens"),
    "one new token": (["{packed}", "--new-tokens", "1"], "'--new-tokens'"),
    "no rounds": (["{packed}", "--rounds", "0"], "'--rounds'"),
    "no batch": (["{packed}", "--batch", "0"], "'--batch'"),
    "no threads": (["{packed}", "--threads", "0"], "'--threads'"),
    "unknown dtype": (["{packed}", "--dtype", "int8"], "'--dtype'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_a_model_is_loaded(case: str, packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Opened, "load", lambda *_: pytest.fail("a model was loaded"))
    arguments, message = BAD[case]
    result = benchmark(*(argument.format(packed=packed) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
