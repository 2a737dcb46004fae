"""Prompts are encoded with or without the chat template, and invalid ones are refused."""

from __future__ import annotations

import pytest
from tiny_models import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from shiftadd_cli.errors import PromptError
from shiftadd_cli.generation.prompt import Prompt, check_prompt, encode_prompt, room_for


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def without_template() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def decoded(prompt: Prompt, tokenizer: PreTrainedTokenizerFast) -> str:
    text = tokenizer.decode(list(prompt.ids))
    assert isinstance(text, str)
    return text


def test_the_chat_template_is_used_if_there_is_one(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = encode_prompt("hello there", tokenizer, name="m")
    assert prompt.chat
    assert decoded(prompt, tokenizer) == "<|user|>hello there<|endoftext|>"
    assert encode_prompt("hello there", tokenizer, name="m", chat=True) == prompt


def test_text_stays_plain_without_a_template_or_with_chat_off(tokenizer: PreTrainedTokenizerFast) -> None:
    expected = Prompt(tuple(tokenizer("hello there")["input_ids"]), chat=False)
    assert encode_prompt("hello there", tokenizer, name="m", chat=False) == expected
    assert encode_prompt("hello there", without_template(), name="m") == expected


def test_the_template_adds_a_generation_prompt() -> None:
    other = tiny_tokenizer()
    other.chat_template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    assert decoded(encode_prompt("hello", other, name="m"), other).endswith("<|assistant|>")


def test_a_plain_text_gets_the_tokenizers_leading_tokens() -> None:
    from tokenizers import processors

    other = without_template()
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert encode_prompt("hello", other, name="m").ids[0] == 0


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt_is_refused(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    with pytest.raises(PromptError, match="empty"):
        encode_prompt(text, tokenizer, name="m")


def test_a_lone_surrogate_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(PromptError, match="UTF-8"):
        encode_prompt("a\udcff", tokenizer, name="m")


def test_a_chat_without_a_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(PromptError, match="tokenizer of some/model has no chat template"):
        encode_prompt("hello", without_template(), name="some/model", chat=True)


def test_a_template_that_rejects_a_single_message_is_refused_with_its_reason() -> None:
    other = tiny_tokenizer()
    other.chat_template = "{{ raise_exception('a system message must come first') }}"
    with pytest.raises(PromptError, match=r"a system message must come first.*`chat=False`"):
        encode_prompt("hello", other, name="m")


def test_the_room_is_the_rest_of_the_context() -> None:
    prompt = Prompt((1, 2, 3), chat=False)
    assert room_for(prompt, 4, name="m") == 1
    assert room_for(prompt, None, name="m") is None
    for positions in (3, 2):
        with pytest.raises(PromptError, match=f"3 tokens, but the context of m is {positions}"):
            room_for(prompt, positions, name="m")


def test_a_token_beyond_the_embedding_is_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["<x>"])
    prompt = encode_prompt("before <x> behind", other, name="m", chat=False)
    check_prompt(prompt, other, 321, name="m")
    with pytest.raises(PromptError, match=r"The prompt has the token '<x>' \(id 320\), and the embedding of m has 320"):
        check_prompt(prompt, other, 320, name="m")
    other.chat_template = "<x>{{ messages[0]['content'] }}"
    with pytest.raises(PromptError, match="chat template or the prompt has the token '<x>'"):
        check_prompt(encode_prompt("hello", other, name="m"), other, 320, name="m")


def test_a_template_that_iterates_over_parts_gets_the_prompt() -> None:
    other = tiny_tokenizer()
    other.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}({{ part.text }})"
        "{% endif %}{% endfor %}{% endfor %}"
    )
    assert decoded(encode_prompt("hello", other, name="m"), other) == "(hello)"
