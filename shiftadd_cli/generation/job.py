"""A generation from names to text: every check before any weight is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from shiftadd_cli.device import choose_device
from shiftadd_cli.errors import RecipeError
from shiftadd_cli.generation.drafts import OpenedDraft, open_draft
from shiftadd_cli.generation.pace import MOST_DRAFTED
from shiftadd_cli.generation.prompt import Prompt, check_prompt, encode_prompt, room_for
from shiftadd_cli.generation.run import Generated, generate_text
from shiftadd_cli.generation.sampling import Sampling
from shiftadd_cli.runtime.opened import Opened, open_any


@dataclass
class GenerationJob:
    """A text to generate; created by `prepare`.

    Attributes:
        prompt: as the model reads it.
        device, dtype: to load with, see `Opened.load`.
        room: tokens left in the model's context; None for a model without an upper limit.
        load_seconds: to load the model and its draft, after `run`.
    """

    opened: Opened
    prompt: Prompt
    sampling: Sampling
    draft: OpenedDraft | None
    draft_tokens: int | None
    device: torch.device
    dtype: str
    room: int | None
    load_seconds: float = 0.0

    @classmethod
    def prepare(
        cls,
        model: str,
        text: str,
        sampling: Sampling,
        *,
        draft: str | None = None,
        draft_tokens: int | None = None,
        chat: bool | None = None,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> GenerationJob:
        """See `api.generate` for the arguments and errors; only headers and tokenizers are read."""
        if draft_tokens is not None and draft is None:
            raise RecipeError("`draft_tokens` changes nothing without `draft`; give a `draft` as well, such as lookup.")
        if draft_tokens is not None and not 1 <= draft_tokens <= MOST_DRAFTED:
            raise RecipeError(f"`draft_tokens` {draft_tokens} is not valid; give a number from 1 to {MOST_DRAFTED}.")
        chosen = choose_device(device)
        opened = open_any(model, trust_remote_code=trust_remote_code)
        tokenizer = opened.load_tokenizer()
        prompt = encode_prompt(text, tokenizer, name=model, chat=chat)
        check_prompt(prompt, tokenizer, opened.vocab_size, name=model)
        room = room_for(prompt, opened.positions, name=model)
        opened_draft = open_draft(draft, opened, trust_remote_code=trust_remote_code)
        return cls(opened, prompt, sampling, opened_draft, draft_tokens, chosen, dtype, room)

    def run(self, write: Callable[[str], None] | None = None) -> Generated:
        """Load the model, and generate; see `generate_text`."""
        start = time.perf_counter()
        loaded = self.opened.load(self.dtype, self.device)
        drafter = None if self.draft is None else self.draft.load(self.dtype, self.device, self.sampling)
        self.load_seconds, self.dtype = time.perf_counter() - start, loaded.info.dtype
        return generate_text(
            loaded,
            self.prompt,
            self.sampling,
            drafter=drafter,
            draft_tokens=self.draft_tokens,
            room=self.room,
            write=write,
        )
