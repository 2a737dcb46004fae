"""Chooses tokens from logits: the likeliest, or seeded draws.

A draw is the maximum of the scaled logits plus Gumbel noise that depends on the seed and the position alone, which has
the distribution of the softmax (Gumbel-max trick). Two models that draw at a position share its noise, so that they
mostly draw the same token. That makes speculation exact: the original's draw is the same, whatever was drafted
(Daliri, Musco and Suresh, arXiv 2408.07978, section 3: drafter-invariant speculative decoding).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from shiftadd_cli.generation.sampling import Sampling

# Temperature and top_p do not depend on the text.
_NO_TOKENS = torch.LongTensor()


class TokenChoice(LogitsProcessor):
    """The choice of a `Sampling`. As a logits processor, it gives the chosen token of each row the highest score."""

    def __init__(self, sampling: Sampling) -> None:
        self._seed, self._draws = sampling.seed, sampling.temperature > 0
        self._warpers: list[LogitsProcessor] = []
        if self._draws:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def scores(self, logits: Tensor, position: int) -> Tensor:
        """Scores, float32 of the shape of `logits` `[tokens, vocabulary]`, whose maximum in a row is the chosen token.

        position: number of tokens before the one that is chosen from the first row; it rises by one per row.
        """
        scores = logits.float()
        if not self._draws:
            return scores
        for warper in self._warpers:
            scores = warper(_NO_TOKENS, scores)
        noise = [self._noise(position + row, scores.shape[-1]) for row in range(len(scores))]
        return scores + torch.stack(noise).to(scores.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.scores(scores, input_ids.shape[1])

    def _noise(self, position: int, count: int) -> Tensor:
        """Standard Gumbel noise, float32 `[count]`; a larger `count` continues a smaller one."""
        # A counter-based generator: every position has its own stream, 2**128 numbers apart from the next.
        stream = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, position, 0]))
        return -torch.from_numpy(stream.standard_exponential(count, dtype=np.float32)).log()


def lead(scores: Tensor) -> Tensor:
    """The distance of the highest score of each row from the second: `[tokens, vocabulary]` → `[tokens]`."""
    if scores.shape[-1] < 2:
        return torch.full(scores.shape[:-1], math.inf)
    first, second = scores.topk(2).values.unbind(-1)
    return first - second
