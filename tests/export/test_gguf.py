"""GGUF files, read back by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import Checkpoint, write_checkpoint
from tiny_models import tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from shiftadd_cli.errors import ExportError, OutputError
from shiftadd_cli.export.gguf import export_gguf
from shiftadd_cli.runtime.opened import load_any

TOKENS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
# Largest relative error of the logits: half a unit in the last place of each weight, accumulated.
ROUNDING = {"float32": 0.0, "float16": 2e-3, "bfloat16": 2e-2, "q8_0": 3e-2}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def checkpoint_of(family: str, folder: Path) -> Checkpoint:
    if family == "qwen3":
        # transformers assumes heads of this size for any Qwen3 in a GGUF file.
        config = tiny_config(family)
        config.head_dim = 128
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    else:
        model = tiny_model(family)
    checkpoint = write_checkpoint(model, folder, tables=True)
    tiny_tokenizer().save_pretrained(folder)
    return checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint_of("llama", tmp_path_factory.mktemp("gguf") / "packed")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_file_computes_the_same_as_the_decoded_weights(tmp_path: Path, family: str, dtype: str) -> None:
    checkpoint = checkpoint_of(family, tmp_path / "packed")
    path, written = export_gguf(checkpoint.folder, tmp_path / "out", dtype)
    assert path == tmp_path / "out" / f"packed-{dtype}.gguf"
    assert written == path.stat().st_size
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = logits(checkpoint.dense)
    error = (logits(loaded) - expected).norm() / expected.norm()
    if dtype == "float32":
        state = checkpoint.dense.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert error <= ROUNDING[dtype]


def test_the_tokenizer_splits_text_as_before(tmp_path: Path, llama: Checkpoint) -> None:
    path, _ = export_gguf(llama.folder, tmp_path / "out", "float16")
    before, after = tiny_tokenizer(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("Hello 1234, world's", "<|user|>hi<|endoftext|>", "  two\n\n\tthree é 漢", ""):
        assert after.encode(text) == before.encode(text)
    assert after.chat_template == before.chat_template
    assert (after.bos_token, after.eos_token, after.pad_token) == (before.bos_token, before.eos_token, before.pad_token)


def test_the_file_can_be_opened_as_a_model(tmp_path: Path, llama: Checkpoint) -> None:
    path, _ = export_gguf(llama.folder, tmp_path / "out", "float32")
    assert torch.equal(logits(load_any(str(path)).model), logits(llama.dense))


def test_equal_checkpoints_give_equal_bytes(tmp_path: Path, llama: Checkpoint) -> None:
    one, two = (export_gguf(llama.folder, tmp_path / out, "q8_0")[0].read_bytes() for out in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("family", "changes", "part"),
    [
        ("gpt2", {}, "gpt2"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
        ("qwen2", {"use_sliding_window": True}, "sliding window"),
    ],
)
def test_unsupported_settings_are_refused(tmp_path: Path, family: str, changes: dict[str, Any], part: str) -> None:
    folder = checkpoint_of(family, tmp_path / "packed").folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ExportError, match=f"{part}.*`format=dense`"):
        export_gguf(folder, tmp_path / "out", "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_values_too_large_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[0] = 1e6
    folder = write_checkpoint(model, tmp_path / "packed").folder
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(ExportError, match=r"embed_tokens.*bfloat16"):
        export_gguf(folder, tmp_path / "out", "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_nothing_is_overwritten(tmp_path: Path, llama: Checkpoint) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        export_gguf(llama.folder, tmp_path / "out", "float16")
