"""Pieces of text contain only complete characters and add up to the text of all tokens."""

from __future__ import annotations

import pytest
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shiftadd_cli.generation.pieces import TextPieces

TEXTS = ("plain words, one by one", "  spaces\n\n  and\tbreaks \n", "naïve 東京 🤖🤖 €", "x" * 50)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose decoder drops the space before the first word, like those of SentencePiece."""
    words = ["▁", *(f"▁{word}" for word in ("Once", "upon", "a", "time")), *"Onceupatim,"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def pieces(tokenizer: PreTrainedTokenizerFast, prompt: list[int], new: list[int]) -> list[str]:
    text = TextPieces(tokenizer, prompt)
    return [*(text.add(token) for token in new), text.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "Here is a long prompt of more than eight tokens: "])
def test_pieces_add_up_to_the_text(text: str, prompt: str) -> None:
    tokenizer = tiny_tokenizer()
    shown = pieces(tokenizer, tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"])
    assert "".join(shown) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)


def test_text_is_shown_as_soon_as_it_is_complete() -> None:
    tokenizer = tiny_tokenizer()
    new = tokenizer("€ a")["input_ids"]
    shown = pieces(tokenizer, tokenizer("It costs 5 ")["input_ids"], new)
    delay = shown.index("€")
    assert delay > 0
    assert shown[:delay] == [""] * delay
    assert "".join(shown[delay + 1 :]) == " a"


def test_an_incomplete_character_is_shown_at_the_end() -> None:
    tokenizer = tiny_tokenizer()
    first_token = tokenizer("€")["input_ids"][0]
    assert pieces(tokenizer, tokenizer("5 ")["input_ids"], [first_token]) == ["", "\N{REPLACEMENT CHARACTER}"]


def test_the_space_before_the_first_new_word_is_kept() -> None:
    tokenizer = metaspace_tokenizer()
    ids = tokenizer("Once upon a time")["input_ids"]
    assert pieces(tokenizer, ids[:2], ids[2:]) == [" a", " time", ""]


def test_special_tokens_have_no_text() -> None:
    tokenizer = tiny_tokenizer()
    word = tokenizer("word")["input_ids"]
    assert "".join(pieces(tokenizer, word, [*word, tokenizer.eos_token_id])) == "word"
