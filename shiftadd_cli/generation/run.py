"""Generates one text from a loaded model and shows it as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from shiftadd_cli.blockwise.forward import RefuseNoNumbers
from shiftadd_cli.errors import PromptError
from shiftadd_cli.generation.choice import TokenChoice
from shiftadd_cli.generation.drafts import Drafter
from shiftadd_cli.generation.pieces import TextPieces
from shiftadd_cli.generation.prompt import Prompt
from shiftadd_cli.generation.sampling import Sampling
from shiftadd_cli.generation.speculation import Speculated, speculate
from shiftadd_cli.runtime.opened import Loaded
from shiftadd_cli.source.tokenizer import end_tokens


@dataclass(frozen=True)
class Generated:
    """A generated text and its timing.

    Attributes:
        text: the continuation of the prompt; tokens: its ids, including the one that ended the text, if any.
        prefill_seconds: until the first new token; decode_seconds: from the first to the last.
        stopped: by a token that ends texts, by the upper limit of tokens, or by the end of the model's context.
        speculated: what drafts did for the text; None without drafts.
    """

    text: str
    prompt_tokens: int
    tokens: list[int]
    prefill_seconds: float
    decode_seconds: float
    stopped: Literal["end", "length", "context"]
    speculated: Speculated | None = None

    @property
    def new_tokens(self) -> int:
        """Number of new tokens."""
        return len(self.tokens)

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second, without the first; None if there is no other."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None

    @property
    def gain(self) -> float | None:
        """How many times as fast as plain decoding of this text the drafts made it; None if that was not measured."""
        plain = None if self.speculated is None else self.speculated.plain_seconds
        return None if plain is None or self.decode_rate is None else self.decode_rate * plain

    def to_dict(self) -> dict[str, Any]:
        """All fields and the rates, as JSON types."""
        return asdict(self) | {
            "new_tokens": self.new_tokens,
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_tokens_per_second": self.decode_rate,
            "gain": self.gain,
        }


def check_generates(model: Any) -> None:
    """Refuse a model whose class cannot generate, which a model's own code may leave out. Raises PromptError."""
    if not hasattr(model, "generate"):
        raise PromptError(
            f"{type(model).__name__} has no method `generate`, so it cannot generate text; `shiftadd evaluate` "
            "measures it."
        )


def generate_text(
    loaded: Loaded,
    prompt: Prompt,
    sampling: Sampling,
    *,
    drafter: Drafter | None = None,
    draft_tokens: int | None = None,
    room: int | None = None,
    write: Callable[[str], None] | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Generated:
    """Let the model continue the prompt until it ends the text or reaches the upper limit of tokens.

    The model's own generation settings (penalties, temperatures, ...) are not used, except for the tokens that end a
    text. The same prompt and sampling give the same text on the same machine with the same threads, with and without
    drafts; for the rounding of 16-bit dtypes see `Speculated.close_calls`.

    Args:
        drafter: drafts tokens that the model verifies. draft_tokens: the length of every draft; None adapts it.
        room: tokens left in the model's context, see `room_for`.
        write: called with every piece of the text as soon as it is available.
        now: clock in seconds.

    Raises:
        NumericalError: the model's logits are not finite.
        PromptError: the model's class cannot generate, or cannot verify drafts.
    """
    check_generates(loaded.model)
    limit = sampling.max_new_tokens if room is None else min(sampling.max_new_tokens, room)
    ends = end_tokens(loaded.model.generation_config, loaded.tokenizer)
    stream = _Stream(TextPieces(loaded.tokenizer, prompt.ids), write, now)
    choice = TokenChoice(sampling)
    speculated = None if drafter is None else Speculated()
    start = now()
    if drafter is None or speculated is None:
        _decode(loaded, prompt, choice, limit, ends, stream)
    else:
        tokens = speculate(loaded, drafter, prompt.ids, choice, limit, speculated, fixed=draft_tokens, now=now)
        for token in tokens:
            stream.add(token)
            if token in ends:
                break
        stream.end()
    ended = stream.tokens[-1] in ends
    full = limit < sampling.max_new_tokens
    return Generated(
        text="".join(stream.pieces),
        prompt_tokens=len(prompt.ids),
        tokens=stream.tokens,
        prefill_seconds=stream.times[0] - start,
        decode_seconds=stream.times[-1] - stream.times[0],
        stopped="end" if ended else "context" if full else "length",
        speculated=speculated,
    )


def _decode(loaded: Loaded, prompt: Prompt, choice: TokenChoice, limit: int, ends: list[int], stream: _Stream) -> None:
    """Decode token by token with transformers' own `generate`."""
    model = loaded.model
    # Replaced, not just overridden: transformers takes missing settings from the checkpoint's.
    model.generation_config = GenerationConfig(max_new_tokens=limit, eos_token_id=None, pad_token_id=0, do_sample=False)
    ids = torch.tensor([prompt.ids], device=model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=stream,
        logits_processor=LogitsProcessorList([RefuseNoNumbers(loaded.info.spec, loaded.info.dtype), choice]),
        stopping_criteria=StoppingCriteriaList([_Ends(ends)]),
    )


class _Stream(BaseStreamer):
    """Receives the prompt once and then every token from transformers."""

    def __init__(self, pieces: TextPieces, write: Callable[[str], None] | None, now: Callable[[], float]) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.pieces: list[str] = []
        self._pieces, self._write, self._now = pieces, write, now
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.add(int(value))

    def add(self, token: int) -> None:
        self.times.append(self._now())
        self.tokens.append(token)
        self._show(self._pieces.add(token))

    def end(self) -> None:
        self._show(self._pieces.finish())

    def _show(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
            if self._write is not None:
                self._write(piece)


class _Ends(StoppingCriteria):
    """Stops a single text at one of these tokens, in a tenth of the time of transformers' own criterion."""

    def __init__(self, ends: list[int]) -> None:
        self._ends = frozenset(ends)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.tensor([int(input_ids[0, -1]) in self._ends], device=input_ids.device)
