"""Decodes many pieces of text at once: one token per piece at every step of transformers' own `generate`.

All pieces begin at position 0 and grow in step, so there is neither padding nor a mask. A token set by an author
replaces the sampled one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from shiftadd_cli.blockwise.distribution import relative_difference, rounding_of
from shiftadd_cli.blockwise.forward import RefuseNoNumbers, check_model_finite, predict
from shiftadd_cli.device import dtype_name
from shiftadd_cli.errors import CalibrationError, NumericalError
from shiftadd_cli.runtime.kv_cache import growing_cache
from shiftadd_cli.self_text.authors import Author


class Sampler:
    """Draws one token per row, among those with at least `min_p` times the probability of the most likely one.

    temperature: the divisor of the logits, above 0. min_p: 0 allows all tokens (arXiv 2407.01082, section 3).
    """

    def __init__(self, temperature: float, min_p: float, generator: torch.Generator) -> None:
        self._temperature, self._floor = temperature, math.log(min_p) if min_p else -math.inf
        self._generator = generator

    def draw(self, logits: Tensor) -> Tensor:
        """Tokens, int64 `[rows]`, drawn from logits, float32 `[rows, vocabulary]`, which are overwritten."""
        logits -= logits.amax(-1, keepdim=True)
        logits /= self._temperature
        logits.masked_fill_(logits < self._floor, -math.inf)
        # In place: allocating a vocabulary per row takes longer than filling it.
        summed = logits.exp_().cumsum_(-1)
        # Drawn on the CPU, so that devices differ only by rounding.
        drawn = torch.rand(len(logits), 1, generator=self._generator).to(summed)
        # Rounding may put a draw at the very end, after the last token with nonzero probability.
        last = summed[:, -1:].nextafter(torch.zeros_like(drawn))
        return torch.searchsorted(summed, (drawn * summed[:, -1:]).minimum(last), right=True).squeeze(1)


def write_rows(
    model: Any,
    authors: Sequence[Author],
    stops: frozenset[int],
    length: int,
    sampler: Sampler,
    ticks: Iterator[object],
) -> Tensor:
    """Let each author fill a piece: int64 `[authors, length]`.

    model: in evaluation mode, on its device. stops: tokens that an author may refuse, see `Author.may_stop`. ticks: a
    progress bar, which advances by one when every piece has another token.

    Raises:
        NumericalError: a parameter, the output of a block, or the logits are not finite.
        CalibrationError: its predictions in decoding differ from those of its forward pass.
    """
    pending = [deque(author.begin()) for author in authors]
    start = torch.tensor([[tokens.popleft()] for tokens in pending], device=model.device)
    if length == 1:
        return start.cpu()
    model.generation_config = GenerationConfig(
        max_new_tokens=length - 1, min_new_tokens=length - 1, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    check = RefuseNoNumbers(type(model).__name__, dtype_name(model.dtype))
    choose = _Choose(
        authors, pending, torch.tensor(sorted(stops), dtype=torch.int64, device=model.device), sampler, ticks
    )
    cache = growing_cache(model)
    try:
        windows: Tensor = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            logits_processor=LogitsProcessorList([check, choose]),
            **({} if cache is None else {"past_key_values": cache}),
        )
    except NumericalError:
        # The logits show the error, but not its location.
        check_model_finite(model, start)
        raise
    _check_decoding(model, windows[:1], choose.last)
    return windows.cpu()


def _check_decoding(model: Any, window: Tensor, logits: Tensor) -> None:
    """Refuse a model whose `generate` and forward pass predict differently, for example because of other positions.

    window: int64 `[1, tokens]` as it was decoded; logits: `[1, vocabulary]`, from which its last token was drawn.
    """
    expected = predict(model, window[:, :-1]).values[:, -1]
    share = relative_difference(logits, expected)
    if not share <= rounding_of(model.dtype):
        raise CalibrationError(
            f"{type(model).__name__} predicts differently in decoding than in prefill (a difference of "
            f"{share:.0%}), so it cannot write its own calibration text; give `calibration` a file, or builtin."
        )


class _Choose(LogitsProcessor):
    """Leaves one possible token per row. `last`: logits of the first row at the last step, `[1, vocabulary]`."""

    last: Tensor

    def __init__(
        self,
        authors: Sequence[Author],
        pending: Sequence[deque[int]],
        stops: Tensor,
        sampler: Sampler,
        ticks: Iterator[object],
    ) -> None:
        self._authors, self._pending, self._stops, self._sampler, self._ticks = authors, pending, stops, sampler, ticks

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.last = scores[:1].clone()
        rows = [row for row, author in enumerate(self._authors) if not author.may_stop]
        if rows:
            scores[torch.tensor(rows, device=scores.device).unsqueeze(1), self._stops] = -math.inf
        sampled = self._sampler.draw(scores).tolist()
        chosen = []
        for author, pending, token in zip(self._authors, self._pending, sampled, strict=True):
            if not pending:
                pending.extend(author.follow(token))
            chosen.append(pending.popleft())
        next(self._ticks, None)
        only = torch.tensor(chosen, device=scores.device).unsqueeze(1)
        return scores.fill_(-math.inf).scatter_(1, only, 0.0)
