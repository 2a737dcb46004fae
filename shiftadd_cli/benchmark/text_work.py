"""What a language model does in a benchmark: read prompts, and write after them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from shiftadd_cli.benchmark.timing import Clock, Span
from shiftadd_cli.benchmark.work import Work
from shiftadd_cli.generation.run import check_generates


def text_work(tokens: Tensor, lengths: Sequence[int], new_tokens: int, batch: int) -> list[Work]:
    """Reading a prompt of each of these lengths, and writing after the shortest of them.

    tokens: `[n]`, the longest prompt at least; a prompt is the first of them, `batch` times. `prefill of N` lasts until
    the first new token, `decode` from there to the last, with a KV cache.
    """
    found = []
    for length in lengths:
        prompts = tokens[:length].expand(batch, length)
        reading = f"prefill of {length}", batch * length
        if length == min(lengths):
            run = partial(time_generation, prompts=prompts, new_tokens=new_tokens)
            found.append(Work(run, (reading, ("decode", batch * (new_tokens - 1)))))
        else:
            found.append(Work(partial(time_generation, prompts=prompts, new_tokens=1), (reading,)))
    return found


def time_generation(model: Any, clock: Clock, prompts: Tensor, new_tokens: int) -> tuple[Span, Span]:
    """Times until the first new token, and from there to the last, of `prompts` `[batch, length]`.

    transformers generates, greedily and with its KV cache; no token ends a text before it is as long as wanted.
    """
    check_generates(model)
    # Nothing the checkpoint brings along may stop early or add work, see `generation.run`.
    model.generation_config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    marks = _Marks(clock)
    start = clock.now()
    model.generate(prompts, attention_mask=torch.ones_like(prompts), logits_processor=LogitsProcessorList([marks]))
    assert len(marks.seen) == new_tokens
    return marks.seen[0] - start, marks.seen[-1] - marks.seen[0]


class _Marks(LogitsProcessor):
    """Notes when each token's logits are there: unlike a streamer it is also told of batches."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seen: list[Span] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(self._clock.now())
        return scores
