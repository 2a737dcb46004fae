"""The Python interface does what the command line does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_models import save_tiny, tiny_model
from tiny_vision import save_tiny_vision
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

import shiftadd_cli
from shiftadd_cli.cli import main
from shiftadd_cli.errors import ArtifactError, RecipeError

QUICK: dict[str, Any] = {"samples": 4, "seq_len": 32, "group_size": 16, "recipe": "equal-bits"}


def test_quantized_model_loads_and_evaluates(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    report = shiftadd_cli.quantize(str(source), tmp_path / "out", bits=2, **QUICK)
    assert {layer.bits for layer in report.layers} == {2}
    model = shiftadd_cli.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
    result = shiftadd_cli.evaluate(
        [str(tmp_path / "out")], against=str(source), context=32, max_tokens=256, show_progress=False
    )
    row = result.to_dict()["models"][0]
    assert row["kl"] > 0


def test_generated_text_is_that_of_the_command(tmp_path: Path) -> None:
    model = str(save_tiny("llama", tmp_path / "one"))
    arguments = ["generate", model, "--prompt", "for", "--max-new-tokens", "9", "--temperature", "0.8", "--seed", "3"]
    shown: list[str] = []
    generated = shiftadd_cli.generate(
        model, "for", max_new_tokens=9, temperature=0.8, seed=3, draft=model, dtype="float32", write=shown.append
    )
    assert CliRunner().invoke(main, [*arguments, "--dtype", "float32"]).stdout == generated.text.rstrip("\n") + "\n"
    assert "".join(shown) == generated.text
    assert generated.speculated is not None
    for draft, length in ((None, 3), ("lookup", 0), ("lookup", 8)):
        with pytest.raises(RecipeError, match="`draft_tokens`"):
            shiftadd_cli.generate(model, "for", draft=draft, draft_tokens=length)


def test_model_in_memory_gives_the_same_files_as_its_folder(tmp_path: Path) -> None:
    source = save_tiny("qwen2", tmp_path / "source")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = shiftadd_cli.quantize(model, tmp_path / "from_memory", processor=tokenizer, **QUICK)
    assert report.source.name == type(model).__name__
    shiftadd_cli.quantize(source, tmp_path / "from_folder", **QUICK)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("from_memory", "from_folder")]
    assert files[0] == files[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from_folder", "from_memory", "source"]


def test_vision_model_in_memory_is_quantized(tmp_path: Path) -> None:
    source = save_tiny_vision("vit", tmp_path / "source")
    model, processor = (
        AutoModelForImageClassification.from_pretrained(source),
        AutoImageProcessor.from_pretrained(source),
    )
    report = shiftadd_cli.quantize(model, tmp_path / "deep" / "out", processor=processor, samples=4, bits=3)
    assert report.source.reads_images


def test_model_in_memory_without_tokenizer_is_refused_and_leaves_no_files(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(shiftadd_cli.ShiftaddError, match="tokenizer"):
        shiftadd_cli.quantize(model, tmp_path / "out", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_allocate_bits_matches_the_command_and_feeds_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path / "cache"))
    source = str(save_tiny("llama", tmp_path / "source"))
    plan = shiftadd_cli.allocate_bits(source, 4.5, keep=["*.o_proj=2"], candidates=[3, 2], fit_rounds=1, **QUICK)
    assert isinstance(plan, shiftadd_cli.BitPlan)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    command = ["allocate-bits", source, "-o", str(tmp_path / "plan.json"), "--avg-bits=4.5", "--fit-rounds=1"]
    result = CliRunner().invoke(main, [*command, "--keep=*.o_proj=2", "--candidates=2,3", *options])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "plan.json").read_text() == plan.to_json()
    report = shiftadd_cli.quantize(
        source, tmp_path / "out", fit_rounds=1, bit_plan=str(tmp_path / "plan.json"), **QUICK
    )
    assert {layer.name: layer.bits for layer in report.layers} == plan.bits
    with pytest.raises(shiftadd_cli.ShiftaddError, match="candidates"):
        shiftadd_cli.allocate_bits(source, 4.5, candidates=(2, 9))
    with pytest.raises(shiftadd_cli.ShiftaddError, match="one of"):
        shiftadd_cli.allocate_bits(source)


def test_fields_override_a_recipe_object(tmp_path: Path) -> None:
    source = save_tiny("gpt2", tmp_path / "source")
    recipe = shiftadd_cli.Recipe.load("fast", {"group_size": 12})
    report = shiftadd_cli.quantize(str(source), tmp_path / "out", recipe, bits=4)
    assert (report.recipe["group_size"], report.recipe["bits"], report.calibration) == (12, 4, None)


def test_bits_override_the_average_of_a_recipe_object(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    recipe = shiftadd_cli.Recipe.load("best", {"reconstruct_epochs": 0, "distill_epochs": 0})
    report = shiftadd_cli.quantize(str(source), tmp_path / "out", recipe, bits=2, samples=8, seq_len=32)
    assert (report.recipe["avg_bits"], {layer.bits for layer in report.layers}) == (None, {2})
    with pytest.raises(shiftadd_cli.ShiftaddError, match="`bits`: 9"):
        shiftadd_cli.quantize(str(source), tmp_path / "more", recipe, bits=9)


def test_errors_share_one_base_class(tmp_path: Path) -> None:
    with pytest.raises(shiftadd_cli.ShiftaddError, match="nowhere"):
        shiftadd_cli.quantize(str(tmp_path / "nowhere"), tmp_path / "out")


def test_importing_the_package_imports_no_torch() -> None:
    import subprocess
    import sys

    program = "import sys, shiftadd_cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    "folder", ["./missing", "~/missing", "/a/missing", "a/missing/", "a/b/c", "missing", Path("a/b")]
)
def test_missing_folder_is_refused_without_asking_the_hub(
    folder: str | Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ArtifactError, match=r"is not a folder; give one that `shiftadd quantize` wrote, or a hub id"):
        shiftadd_cli.load(folder)


def test_linear_attention_is_that_of_the_command(tmp_path: Path) -> None:
    model = str(save_tiny("llama", tmp_path / "model"))
    sizes = ("--window", "8", "--samples", "2", "--seq-len", "64", "--steps", "1", "--layers", "0")
    assert CliRunner().invoke(main, ["linearize", model, "-o", str(tmp_path / "one"), *sizes]).exit_code == 0
    result = shiftadd_cli.linearize(model, tmp_path / "other", window=8, samples=2, seq_len=64, steps=1, layers="0")
    assert result.chosen == (0,)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert files[0] == files[1]
