"""From what the user wrote to the tokens the model reads."""

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
    """The tokens of `text`, a message of the user or (not `chat`) the beginning of a text to go on with.

    chat: None uses the chat template where the tokenizer has one. A text to go on with gets the special tokens that
    the tokenizer puts before a text. `name` of the model is for messages.

    Raises:
        PromptError: the text is empty, there is no chat template, or it does not take a message of the user alone.
    """
    from jinja2 import TemplateError

    if not text.strip():
        raise PromptError("The prompt is empty; give `prompt` some text.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError("The prompt is no valid UTF-8 text; convert it first.")
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise PromptError(f"The tokenizer of {name} has no chat template; leave out `chat`.")
    use_chat = bool(template) if chat is None else chat
    # Of a length beyond what it was made for the tokenizer would warn; `room_for` decides.
    quiet = {"verbose": False}
    if use_chat:
        message = for_template([{"role": "user", "content": text}], tokenizer, where="The prompt")
        try:
            ids = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=False, tokenizer_kwargs=quiet
            )
        except TemplateError as error:
            raise PromptError(
                f"The chat template of {name} does not take a message of the user alone ({error}); use `chat=False`."
            ) from error
    else:
        ids = tokenizer(text, **quiet)["input_ids"]
    if not ids:
        raise PromptError(f"The tokenizer of {name} makes no token of the prompt; give another text.")
    return Prompt(tuple(ids), use_chat)


def check_prompt(prompt: Prompt, tokenizer: Any, rows: int, *, name: str) -> None:
    """Refuse tokens that the embedding of the model, which has so many rows, does not hold.

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
    """How many tokens the model can add to the prompt; None for a model without a last position.

    Raises:
        PromptError: none.
    """
    if positions is None:
        return None
    if len(prompt.ids) >= positions:
        raise PromptError(
            f"The prompt has {len(prompt.ids):,} tokens, and the context of {name} is {positions:,}; shorten it."
        )
    return positions - len(prompt.ids)
