"""Decodes a text from drafts: the model verifies several drafted tokens in one pass, and its own choices are the text.

Speculative decoding (Leviathan, Kalman and Matias, arXiv 2211.17192) with choices that do not depend on the drafts, see
`choice`: a drafted token is accepted if the model chooses it at that position.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from shiftadd_cli.blockwise.forward import RefuseNoNumbers
from shiftadd_cli.generation.choice import TokenChoice, lead
from shiftadd_cli.generation.drafts import Drafter, cache_for, last_logits
from shiftadd_cli.generation.pace import MOST_DRAFTED, Draft, Pace
from shiftadd_cli.runtime.kv_cache import take_back
from shiftadd_cli.runtime.opened import Loaded


@dataclass
class Speculated:
    """What speculation did for a text.

    Attributes:
        drafted, accepted: numbers of tokens.
        passes: forwards of the model after the prompt.
        plain_seconds: per token of decoding without drafts, measured in between; None if there was no such token.
        close_calls: tokens whose lead over the second choice was within the rounding of a 16-bit dtype. Where the model
            computes in torch, whose sums depend on the number of rows, plain decoding may choose the other one.
    """

    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    plain_seconds: float | None = None
    close_calls: int = 0


def speculate(
    loaded: Loaded,
    drafter: Drafter,
    prompt: Sequence[int],
    choice: TokenChoice,
    limit: int,
    account: Speculated,
    *,
    fixed: int | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Iterator[int]:
    """The tokens that the model chooses after the prompt, at most `limit`.

    account: is kept up to date. fixed: the length of every draft; None adapts it to the measured times, see `Pace`.
    now: clock in seconds.

    Raises:
        NumericalError: logits are not finite.
        PromptError: the model cannot take tokens back.
    """
    verifier = _Verifier(loaded, choice)
    text = list(prompt)
    token = verifier.begin(text)
    drafter.begin(text)
    pace = Pace(fixed is not None)
    most = MOST_DRAFTED if fixed is None else fixed
    text.append(token)
    yield token
    new = 1
    while new < limit:
        start = now()
        # The last token of the text needs no draft: the model chooses one after every draft.
        room = min(most, limit - new - 1)
        draft = drafter.draft(text, room, pace.gains_from) if pace.drafts_now(new - 1) else Draft()
        drafted = now()
        chosen = verifier.verify(text, draft, account)
        pace.record(draft, len(chosen) - 1, drafted - start, now() - drafted)
        account.plain_seconds = pace.plain_seconds
        new += len(chosen)
        for token in chosen:
            text.append(token)
            yield token


class _Verifier:
    """The model whose choices are the text."""

    def __init__(self, loaded: Loaded, choice: TokenChoice) -> None:
        self._model, self._choice = loaded.model, choice
        self._cache = cache_for(loaded)
        self._refuse = RefuseNoNumbers(loaded.info.spec, loaded.info.dtype)
        dtype: torch.dtype = loaded.model.dtype
        # Rounding moves a logit by few units in its last place; float32 has none that is worth a count.
        self._rounding = 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0

    def begin(self, prompt: list[int]) -> int:
        """Read the prompt; returns the token after it."""
        (token,), _ = self._choose(prompt, 1, len(prompt))
        return token

    def verify(self, text: list[int], draft: Draft, account: Speculated) -> list[int]:
        """The accepted tokens of a draft that follows `text`, and the model's own after them."""
        rows = [text[-1], *draft.tokens]
        chosen, close = self._choose(rows, len(rows), len(text))
        accepted = next(
            (number for number, token in enumerate(draft.tokens) if token != chosen[number]), len(draft.tokens)
        )
        take_back(self._cache, len(draft.tokens) - accepted)
        account.passes += 1
        account.drafted += len(draft.tokens)
        account.accepted += accepted
        account.close_calls += sum(close[: accepted + 1])
        return chosen[: accepted + 1]

    def _choose(self, ids: list[int], rows: int, position: int) -> tuple[list[int], list[bool]]:
        """The tokens chosen after each of the last `rows` of `ids`, which are appended to the cache, and whether each
        was a close call.

        position: the number of tokens before the first one that is chosen.
        """
        tokens = torch.tensor([ids], device=self._model.device)
        logits = self._refuse(tokens, last_logits(self._model, tokens, self._cache, rows))
        scores = self._choice.scores(logits, position)
        largest = logits.abs().amax(-1).float()
        close = lead(scores) <= self._rounding * largest if self._rounding else torch.zeros(rows, dtype=torch.bool)
        return scores.argmax(-1).tolist(), close.tolist()
