"""Tokenizers: read from folders and GGUF files, written so that they read back to the same ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import FAMILIES, save_tiny, save_tiny_gguf, tiny_tokenizer
from transformers import AutoTokenizer, GenerationConfig

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import open_source

TEXT = "The with statement, 12345 naïve 你好\t\n  x = [1]<|endoftext|>"
MESSAGES = [{"role": "user", "content": "What is a slice?"}]


def _check_saved(spec: Path, out: Path) -> None:
    source, expected = open_source(str(spec)), tiny_tokenizer()
    assert source.load_tokenizer() is source.load_tokenizer()
    out.mkdir()
    source.save_companions(out)
    for tokenizer in (source.load_tokenizer(), AutoTokenizer.from_pretrained(out)):
        assert tokenizer(TEXT).input_ids == expected(TEXT).input_ids
        assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
        assert tokenizer.eos_token_id == expected.eos_token_id
        chat = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
        assert chat == expected.apply_chat_template(MESSAGES, tokenize=False)
    assert GenerationConfig.from_pretrained(out).eos_token_id == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_folder(family: str, tmp_path: Path) -> None:
    _check_saved(save_tiny(family, tmp_path / "model"), tmp_path / "out")


def test_gguf(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf")
    _check_saved(tmp_path / "tiny.gguf", tmp_path / "out")


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(SourceError, match=r"holds no tokenizer.*tokenizer files of the original model"):
        open_source(str(folder)).load_tokenizer()
