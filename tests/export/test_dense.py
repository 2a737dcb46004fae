"""A dense export has the decoded weights of the checkpoint, and loads without this package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifacts import COMMON, edit_tensors, write_checkpoint
from safetensors import safe_open
from tiny_models import FAMILIES, MIXTURES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import shiftadd_cli  # noqa: F401 - registers the format with transformers
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.errors import ArtifactError, ExportError, OutputError
from shiftadd_cli.export.dense import export_dense

TOKENS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
ROTATED = COMMON.replaced(rotation="hadamard", outlier_columns=0.05)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
def test_the_export_equals_the_dequantized_model(tmp_path: Path, family: str) -> None:
    checkpoint = write_checkpoint(tiny_model(family), tmp_path / "packed", common=ROTATED, tables=family != "gemma3")
    out = tmp_path / "dense"
    written = export_dense(checkpoint.folder, out)
    assert written == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    expected = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).dequantize()
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.dtype == torch.float32
    state = plain.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    assert torch.equal(logits(plain), logits(expected))
    tied = bool(plain.all_tied_weights_keys)
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied
    if family not in MIXTURES:  # their files store experts in another form, see test_original_names.py
        assert len(tensors_of(out)) == len(state) - len(plain.all_tied_weights_keys)


def test_exports_load_without_this_package(tmp_path: Path) -> None:
    folders = []
    for family in ("llama", "gpt_oss", "mixtral"):
        checkpoint = write_checkpoint(tiny_model(family), tmp_path / family / "packed")
        tiny_tokenizer().save_pretrained(checkpoint.folder)
        folder = tmp_path / family / "dense"
        export_dense(checkpoint.folder, folder)
        folders.append(str(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.encode("Hello") == tiny_tokenizer().encode("Hello")
        assert tokenizer.chat_template == tiny_tokenizer().chat_template
    program = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[1:]:\n"
        "    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)\n"
        "    assert not info['missing_keys'] and not info['unexpected_keys'], (folder, info)\n"
        "assert 'shiftadd_cli' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, *folders], check=True, timeout=240)


@pytest.mark.parametrize("tables", [True, COMMON.replaced(outlier_columns=0.05)], ids=["8-bit rows", "planes"])
def test_another_dtype_is_rounded_once(tmp_path: Path, tables: bool | MatrixFormat) -> None:
    checkpoint = write_checkpoint(tiny_model("gpt2"), tmp_path / "packed", tables=tables)
    export_dense(checkpoint.folder, tmp_path / "dense", torch.bfloat16)
    state = checkpoint.dense.state_dict()
    for name, tensor in tensors_of(tmp_path / "dense").items():
        assert torch.equal(tensor, state[name].to(torch.bfloat16)), name
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == "bfloat16"


def test_values_too_large_for_float16_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data[0] = 1e6
    checkpoint = write_checkpoint(model, tmp_path / "packed")
    with pytest.raises(ExportError, match=r"model\.norm\.weight.*bfloat16"):
        export_dense(checkpoint.folder, tmp_path / "dense", torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_equal_checkpoints_give_equal_bytes_without_the_checkpoints_reports(tmp_path: Path) -> None:
    folder = write_checkpoint(tiny_model("llama"), tmp_path / "packed").folder
    for name in ("README.md", "report.html", "evaluation.json", "generation_config.json"):
        (folder / name).write_text("{}")
    for out in ("one", "two"):
        export_dense(folder, tmp_path / out)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert one == two
    assert set(one) == {"config.json", "generation_config.json", "model.safetensors"}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = write_checkpoint(tiny_model("llama"), tmp_path / "packed").folder
    out = tmp_path / "dense"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        export_dense(folder, out)
    with pytest.raises(OutputError, match="not empty"):
        export_dense(folder, folder)
    with pytest.raises(OutputError, match="inside"):
        export_dense(folder, folder / "dense")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "change",
    [
        {"model.norm.weight": None},
        {"model.norm.weight": torch.zeros(3)},
        {"model.more.weight": torch.zeros(3)},
    ],
)
def test_missing_extra_and_misshapen_tensors_are_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None]
) -> None:
    folder = write_checkpoint(tiny_model("llama"), tmp_path / "packed", shard_bytes=10_000_000).folder
    edit_tensors(folder, change)
    with pytest.raises(ArtifactError, match=next(iter(change))):
        export_dense(folder, tmp_path / "dense")
    shutil.rmtree(folder)
    assert not list(tmp_path.iterdir())
