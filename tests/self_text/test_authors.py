"""Authors add exactly the tokens of the tokenizer and its chat template, and leave no text or message empty."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from shiftadd_cli.errors import CalibrationError
from shiftadd_cli.self_text.authors import (
    EXCHANGES,
    QUESTION,
    Author,
    ChatAuthor,
    ChatForm,
    DocumentAuthor,
    Vocabulary,
)

WORDS = [40, 41, 42]


def vocabulary(tokenizer: PreTrainedTokenizerFast | None = None) -> Vocabulary:
    return Vocabulary.of(tokenizer or tiny_tokenizer(), VOCAB_SIZE)


def fill(author: Author, sampled: list[int]) -> list[int]:
    """The window that an author makes of these sampled tokens."""
    window = list(author.begin())
    for token in sampled:
        window += author.follow(token)
    return window


def test_special_tokens_end_texts_and_never_begin_them() -> None:
    tokenizer = tiny_tokenizer()
    vocab = vocabulary(tokenizer)
    assert vocab.stops == set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    assert not vocab.stops.intersection(vocab.first)
    texts = [str(tokenizer.decode([number])) for number in vocab.first]
    assert all(text.strip() and "\N{REPLACEMENT CHARACTER}" not in text for text in texts)


def test_the_models_own_end_token_begins_no_text() -> None:
    assert 77 in Vocabulary.of(tiny_tokenizer(), VOCAB_SIZE, [77]).stops
    assert 77 not in Vocabulary.of(tiny_tokenizer(), VOCAB_SIZE, [77]).first


def test_tokens_beyond_the_embedding_begin_no_text() -> None:
    assert max(Vocabulary.of(tiny_tokenizer(), 100).first) < 100


def test_a_tokenizer_without_words_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"no token that a text can begin with.*give `calibration` a file"):
        Vocabulary.of(tiny_tokenizer(), 2)


def test_first_tokens_are_drawn_from_the_whole_vocabulary() -> None:
    vocab, generator = vocabulary(), torch.Generator().manual_seed(0)
    drawn = {vocab.draw_first(generator) for _ in range(20 * len(vocab.first))}
    assert drawn == set(vocab.first)


def test_the_form_reproduces_the_template() -> None:
    tokenizer = tiny_tokenizer()
    form = ChatForm.of(tokenizer, vocabulary(tokenizer))
    assert form is not None
    texts = ["How are you?", "Well, and you?", "So-so.", "Good."]
    roles = ["user", "assistant"] * 2
    expected = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)], tokenize=False
    )
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    between = [form.opening, form.to_assistant, form.to_user, form.to_assistant]
    joined = [token for before, text in zip(between, ids, strict=True) for token in (*before, *text)]
    assert tokenizer.decode([*joined, *form.closing]) == expected


def test_a_conversation_has_the_tokenizers_start_once() -> None:
    plain, before = tiny_tokenizer(), tiny_tokenizer(before=("<|endoftext|>",))
    expected = ChatForm.of(plain, vocabulary(plain))
    form = ChatForm.of(before, vocabulary(before))
    assert form is not None
    assert expected is not None
    assert form.opening == (0, *expected.opening)
    before.chat_template = "<|endoftext|>" + before.chat_template
    again = ChatForm.of(before, vocabulary(before))
    assert again is not None
    assert again.opening == form.opening


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",  # the model cannot end a message
        "{{ messages[-1]['content'] }}<|endoftext|>",  # not all messages
        "{% for m in messages %}<|user|>{{ m['content'] | upper }}<|endoftext|>{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_without_ends_of_messages_has_no_form(template: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert ChatForm.of(tokenizer, vocabulary(tokenizer)) is None


def test_a_conversation_takes_turns_and_another_follows() -> None:
    tokenizer = tiny_tokenizer()
    vocab = vocabulary(tokenizer)
    form = ChatForm.of(tokenizer, vocab)
    assert form is not None
    author, stop = ChatAuthor(form, vocab.stops), min(vocab.stops)
    messages = 2 * EXCHANGES + 1
    window = fill(author, [*WORDS, stop] * messages)
    turns = [*[*[form.to_assistant], *[form.to_user]] * EXCHANGES][:-1]
    one = [*form.opening, *WORDS, *(token for turn in turns for token in (*turn, *WORDS)), *form.closing]
    assert window == [*one, *form.opening, *WORDS, *form.to_assistant]


def test_an_endless_question_is_answered() -> None:
    tokenizer = tiny_tokenizer()
    vocab = vocabulary(tokenizer)
    form = ChatForm.of(tokenizer, vocab)
    assert form is not None
    endless = 10 * QUESTION
    window = fill(ChatAuthor(form, vocab.stops), [40] * endless)
    # The answer is not cut short.
    assert window == [*form.opening, *[40] * QUESTION, *form.to_assistant, *[40] * (endless - QUESTION)]


def test_no_message_is_empty() -> None:
    tokenizer = tiny_tokenizer()
    vocab = vocabulary(tokenizer)
    form = ChatForm.of(tokenizer, vocab)
    assert form is not None
    author = ChatAuthor(form, vocab.stops)
    author.begin()
    for _ in range(6):
        assert not author.may_stop
        author.follow(WORDS[0])
        assert author.may_stop
        author.follow(min(vocab.stops))


def test_documents_begin_with_the_tokenizers_start() -> None:
    vocab = vocabulary()
    with_start = Vocabulary((7,), vocab.stops, vocab.first, vocab.size)
    generator = torch.Generator().manual_seed(0)
    windows = [DocumentAuthor(with_start, generator, number).begin() for number in range(4)]
    assert all(window[0] == 7 for window in windows)
    # Every second document continues with a token from the vocabulary, the others with the model's choice.
    assert sorted(len(window) for window in windows) == [1, 1, 2, 2]
    assert all(len(DocumentAuthor(vocab, generator, number).begin()) == 1 for number in range(4))


def test_a_document_does_not_end() -> None:
    assert not DocumentAuthor(vocabulary(), torch.Generator().manual_seed(0), 0).may_stop


def test_an_author_always_continues() -> None:
    vocab, generator = vocabulary(), torch.Generator().manual_seed(0)
    form = ChatForm.of(tiny_tokenizer(), vocab)
    assert form is not None
    for author in (DocumentAuthor(vocab, generator, 0), ChatAuthor(form, vocab.stops)):
        assert author.begin()
        for token in range(VOCAB_SIZE):
            assert author.follow(token)


def test_neighbouring_documents_differ() -> None:
    vocab, generator = vocabulary(), torch.Generator().manual_seed(0)
    starts = [tuple(DocumentAuthor(vocab, generator, number).begin()) for number in range(50)]
    assert sum(one == other for one, other in pairwise(starts)) < 5
