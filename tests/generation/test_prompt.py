"""Prompts become tokens by the chat template or as they are, and what cannot be one is refused."""

from __future__ import annotations

import pytest
from tiny_models import tiny_tokenizer

from shiftadd_cli.errors import PromptError
from shiftadd_cli.generation.prompt import Prompt, check_prompt, encode_prompt, room_for


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def plain(tokenizer):
    other = tiny_tokenizer()
    other.chat_template = None
    return other


def test_a_template_is_used_where_there_is_one(tokenizer):
    prompt = encode_prompt("hello there", tokenizer, name="m")
    assert prompt.chat
    assert tokenizer.decode(prompt.ids) == "<|user|>hello there<|endoftext|>"
    assert encode_prompt("hello there", tokenizer, name="m", chat=True) == prompt


def test_without_a_template_or_a_wish_for_it_the_text_stands_alone(tokenizer):
    expected = Prompt(tuple(tokenizer("hello there")["input_ids"]), chat=False)
    assert encode_prompt("hello there", tokenizer, name="m", chat=False) == expected
    assert encode_prompt("hello there", plain(tokenizer), name="m") == expected


def test_the_template_is_asked_for_an_answer():
    other = tiny_tokenizer()
    other.chat_template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    assert other.decode(encode_prompt("hello", other, name="m").ids).endswith("<|assistant|>")


def test_special_tokens_that_the_tokenizer_adds_before_a_text_are_there():
    from tokenizers import processors

    other = plain(None)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert encode_prompt("hello", other, name="m").ids[0] == 0


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt_is_refused(tokenizer, text):
    with pytest.raises(PromptError, match="empty"):
        encode_prompt(text, tokenizer, name="m")


def test_half_a_character_is_refused(tokenizer):
    with pytest.raises(PromptError, match="UTF-8"):
        encode_prompt("a\udcff", tokenizer, name="m")


def test_a_chat_without_template_is_refused(tokenizer):
    with pytest.raises(PromptError, match="tokenizer of some/model has no chat template"):
        encode_prompt("hello", plain(tokenizer), name="some/model", chat=True)


def test_a_template_that_takes_no_single_message_is_refused_with_its_own_words():
    other = tiny_tokenizer()
    other.chat_template = "{{ raise_exception('a system message must come first') }}"
    with pytest.raises(PromptError, match=r"a system message must come first.*`chat=False`"):
        encode_prompt("hello", other, name="m")


def test_a_prompt_leaves_the_rest_of_the_context():
    prompt = Prompt((1, 2, 3), chat=False)
    assert room_for(prompt, 4, name="m") == 1
    assert room_for(prompt, None, name="m") is None
    for positions in (3, 2):
        with pytest.raises(PromptError, match=f"3 tokens, but the context of m is {positions}"):
            room_for(prompt, positions, name="m")


def test_a_token_beyond_the_embedding_is_named(tokenizer):
    other = tiny_tokenizer()
    other.add_tokens(["<x>"])
    prompt = encode_prompt("before <x> behind", other, name="m", chat=False)
    check_prompt(prompt, other, 321, name="m")
    with pytest.raises(PromptError, match=r"The prompt has the token '<x>' \(id 320\), and the embedding of m has 320"):
        check_prompt(prompt, other, 320, name="m")
    other.chat_template = "<x>{{ messages[0]['content'] }}"
    with pytest.raises(PromptError, match="chat template or the prompt has the token '<x>'"):
        check_prompt(encode_prompt("hello", other, name="m"), other, 320, name="m")


def test_a_template_that_iterates_over_parts_shows_the_prompt():
    other = tiny_tokenizer()
    other.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}({{ part.text }})"
        "{% endif %}{% endfor %}{% endfor %}"
    )
    assert other.decode(encode_prompt("hello", other, name="m").ids) == "(hello)"
