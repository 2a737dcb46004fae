"""Pieces of text are whole characters and add up to the text of all tokens."""

from __future__ import annotations

import pytest
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shiftadd_cli.generation.pieces import TextPieces

TEXTS = ("plain words, one by one", "  spaces\n\n  and\tbreaks \n", "naïve 東京 🤖🤖 €", "x" * 50)


def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer whose decoder drops the space before the first word, as those made by SentencePiece do."""
    words = ["▁", *(f"▁{word}" for word in ("Once", "upon", "a", "time")), *"Onceupatim,"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def pieces(tokenizer, prompt: list[int], new: list[int]) -> list[str]:
    text = TextPieces(tokenizer, prompt)
    return [*(text.add(token) for token in new), text.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "Here is a long prompt of more than eight tokens: "])
def test_pieces_add_up_to_the_text(text, prompt):
    tokenizer = tiny_tokenizer()
    found = pieces(tokenizer, tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"])
    assert "".join(found) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


def test_text_is_shown_as_soon_as_it_is_whole():
    tokenizer = tiny_tokenizer()
    new = tokenizer("€ a")["input_ids"]
    found = pieces(tokenizer, tokenizer("It costs 5 ")["input_ids"], new)
    held = found.index("€")
    assert held > 0
    assert found[:held] == [""] * held
    assert "".join(found[held + 1 :]) == " a"


def test_a_character_that_never_becomes_whole_is_shown_at_the_end():
    tokenizer = tiny_tokenizer()
    start = tokenizer("€")["input_ids"][0]
    assert pieces(tokenizer, tokenizer("5 ")["input_ids"], [start]) == ["", "\N{REPLACEMENT CHARACTER}"]


def test_the_space_before_the_first_new_word_is_kept():
    tokenizer = metaspace()
    ids = tokenizer("Once upon a time")["input_ids"]
    assert pieces(tokenizer, ids[:2], ids[2:]) == [" a", " time", ""]


def test_special_tokens_have_no_text():
    tokenizer = tiny_tokenizer()
    word = tokenizer("word")["input_ids"]
    assert "".join(pieces(tokenizer, word, [*word, tokenizer.eos_token_id])) == "word"
