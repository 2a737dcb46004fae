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


def with_splitter(splitter, normalizer=None):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = splitter
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def by_pattern(pattern):
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
def test_rules_for_splitting_have_names(splitter, name):
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
def test_rules_without_a_name_are_refused(splitter, normalizer):
    with pytest.raises(ExportError, match="tokenizer"):
        GgufTokenizer.read(with_splitter(splitter, normalizer), VOCAB_SIZE)


def test_another_kind_of_tokenizer_is_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(ExportError, match="not byte-level BPE"):
        GgufTokenizer.read(words, 2)


def test_ids_are_the_tokenizer_s_and_the_rest_is_filled_up():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<own>"])
    found = GgufTokenizer.read(tokenizer, VOCAB_SIZE + 10)
    assert len(found.tokens) == len(found.types) == VOCAB_SIZE + 10
    for text, index in tokenizer.get_vocab().items():
        assert found.tokens[index] == text
    kinds = {text: found.types[tokenizer.convert_tokens_to_ids(text)] for text in ("<|user|>", "<own>", "a")}
    control, own, normal = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.NORMAL
    assert kinds == {"<|user|>": control, "<own>": own, "a": normal}
    assert found.types[-1] == gguf.TokenType.UNUSED
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert len(found.merges) == len(merges)
    with pytest.raises(ExportError, match="the model knows"):
        GgufTokenizer.read(tokenizer, VOCAB_SIZE)
