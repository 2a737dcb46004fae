"""Encodes the user's text as the tokens that the model reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shiftadd_cli.data.conversations import for_template
from shiftadd_cli.errors import PromptError
from shiftadd_cli.source.tokenizer import unknown_token


@dataclass(frozen=True)
class Prompt:
    """The tokens the model reads first, and whether they are a message in the tokenizer's chat template."""

    ids: tuple[int, ...]
    chat: bool


def encode_prompt(text: str, tokenizer: Any, *, name: str, chat: bool | None = None) -> Prompt:
    """The tokens of `text`, a message of the user or (not `chat`) the beginning of a text to continue.

    chat: None uses the chat template if the tokenizer has one. A text to continue gets the special tokens that the
    tokenizer puts before a text. name: of the model, for messages.

    Raises:
        PromptError: the text is empty, there is no chat template, or it does not accept a single user message.
    """
    from jinja2 import TemplateError

    if not text.strip():
        raise PromptError("The prompt is empty; give `prompt` some text.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError("The prompt is not valid UTF-8 text; convert it first.")
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise PromptError(f"The tokenizer of {name} has no chat template; leave out `chat`.")
    use_chat = bool(template) if chat is None else chat
    # The tokenizer would warn about texts longer than its own limit; `room_for` decides instead.
    quiet = {"verbose": False}
    if use_chat:
        message = for_template([{"role": "user", "content": text}], tokenizer, where="The prompt")
        try:
            ids = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=False, tokenizer_kwargs=quiet
            )
        except TemplateError as error:
            raise PromptError(
                f"The chat template of {name} does not accept a single user message ({error}); use `chat=False`."
            ) from error
    else:
        ids = tokenizer(text, **quiet)["input_ids"]
    if not ids:
        raise PromptError(f"The tokenizer of {name} turns the prompt into no tokens; give another text.")
    return Prompt(tuple(ids), use_chat)


def check_prompt(prompt: Prompt, tokenizer: Any, rows: int, *, name: str) -> None:
    """Refuse tokens outside the embedding of the model, which has `rows` rows.

    Raises:
        PromptError: with the token, its id, and the rows.
    """
    if unknown := unknown_token(prompt.ids, tokenizer, rows):
        source = "The chat template or the prompt" if prompt.chat else "The prompt"
        raise PromptError(
            f"{source} has {unknown}, and the embedding of {name} has {rows:,} rows; leave the token out, or give the "
            "model the tokenizer that it was trained with."
        )


def room_for(prompt: Prompt, positions: int | None, *, name: str) -> int | None:
    """The number of tokens the model can add to the prompt; None for a model without an upper limit.

    Raises:
        PromptError: there is no room for any.
    """
    if positions is None:
        return None
    if len(prompt.ids) >= positions:
        raise PromptError(
            f"The prompt has {len(prompt.ids):,} tokens, but the context of {name} is {positions:,}; shorten it."
        )
    return positions - len(prompt.ids)
