"""Tokenizers as metadata of GGUF files."""

from __future__ import annotations

import json

import gguf
import pytest
from tiny_models import VOCAB_SIZE, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from shiftadd_cli.errors import ExportError
from shiftadd_cli.export.gguf_tokenizer import GgufTokenizer

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
BARE_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def with_splitter(
    splitter: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = splitter
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def by_pattern(pattern: str) -> pre_tokenizers.Sequence:
    from tokenizers import Regex

    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), BARE_BYTES])


@pytest.mark.parametrize(
    ("splitter", "name"),
    [
        (BYTES, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), "smollm"),
        (by_pattern(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), "llama-bpe"),
        (by_pattern(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), "qwen2"),
    ],
)
def test_known_splitting_rules_have_names(splitter: pre_tokenizers.PreTokenizer, name: str) -> None:
    assert GgufTokenizer.read(with_splitter(splitter), VOCAB_SIZE).split == name


@pytest.mark.parametrize(
    ("splitter", "normalizer"),
    [
        (pre_tokenizers.Whitespace(), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTES]), None),
        (by_pattern("[a-z]+"), None),
        (BYTES, normalizers.Lowercase()),
    ],
)
def test_other_splitting_rules_are_refused(
    splitter: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None
) -> None:
    with pytest.raises(ExportError, match="tokenizer"):
        GgufTokenizer.read(with_splitter(splitter, normalizer), VOCAB_SIZE)


def test_tokenizers_other_than_byte_level_bpe_are_refused() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(ExportError, match="not byte-level BPE"):
        GgufTokenizer.read(words, 2)


def test_ids_are_the_tokenizers_and_the_rest_is_padded() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<own>"])
    exported = GgufTokenizer.read(tokenizer, VOCAB_SIZE + 10)
    assert len(exported.tokens) == len(exported.types) == VOCAB_SIZE + 10
    ids = tokenizer.get_vocab()
    for text, index in ids.items():
        assert exported.tokens[index] == text
    kinds = {text: exported.types[ids[text]] for text in ("<|user|>", "<own>", "a")}
    control, own, normal = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.NORMAL
    assert kinds == {"<|user|>": control, "<own>": own, "a": normal}
    assert exported.types[-1] == gguf.TokenType.UNUSED
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert len(exported.merges) == len(merges)
    with pytest.raises(ExportError, match="the model knows"):
        GgufTokenizer.read(tokenizer, VOCAB_SIZE)
