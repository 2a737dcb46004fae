"""Tokenizers: read from folders and GGUF files, written so that they read back to the same ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import FAMILIES, save_tiny, save_tiny_gguf, tiny_tokenizer
from transformers import AutoTokenizer, GenerationConfig

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import open_source
from shiftadd_cli.source.tokenizer import leading_tokens, tokens_as_text, unknown_token

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
def test_tokenizer_of_a_folder_is_read_and_saved(family: str, tmp_path: Path) -> None:
    _check_saved(save_tiny(family, tmp_path / "model"), tmp_path / "out")


def test_tokenizer_of_a_gguf_file_is_read_and_saved(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf")
    _check_saved(tmp_path / "tiny.gguf", tmp_path / "out")


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(SourceError, match=r"holds no tokenizer.*tokenizer files of the original model"):
        open_source(str(folder)).load_tokenizer()


@pytest.mark.parametrize("before", [(), ("<|user|>",), ("<|user|>", "<|assistant|>")])
def test_leading_tokens_are_those_that_the_tokenizer_adds(before: tuple[str, ...]) -> None:
    tokenizer = tiny_tokenizer(before=before)
    ids = leading_tokens(tokenizer)
    assert tokens_as_text(tokenizer, ids) == "".join(before)
    bare, full = (tokenizer(TEXT, add_special_tokens=added)["input_ids"] for added in (False, True))
    assert full == [*ids, *bare]


def test_trailing_token_is_not_a_leading_one() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A <|endoftext|>", special_tokens=[("<|user|>", 1), ("<|endoftext|>", 0)]
    )
    assert leading_tokens(tokenizer) == (1,)


@pytest.mark.parametrize("adds", [True, False])
def test_gguf_file_decides_whether_texts_begin_with_bos(tmp_path: Path, adds: bool) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf", adds_bos=adds)
    assert leading_tokens(open_source(str(tmp_path / "tiny.gguf")).load_tokenizer()) == ((0,) if adds else ())


def test_tokenizer_whose_special_tokens_change_the_text_is_refused() -> None:
    class Odd:
        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [1, 2] if add_special_tokens else [3]}

    with pytest.raises(SourceError, match="special tokens the tokenizer Odd puts before a text"):
        leading_tokens(Odd())


def test_token_without_a_row_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<x>"])
    assert unknown_token([1, 319], tokenizer, 320) is None
    assert unknown_token([1, 320, 319], tokenizer, 320) == "the token '<x>' (id 320)"
    assert unknown_token([], tokenizer, 320) is None
