"""The work that all models of a benchmark do in turns: reading prompts and writing, or classifying images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from shiftadd_cli.benchmark.timing import Clock, Span
from shiftadd_cli.blockwise.forward import run_model
from shiftadd_cli.generation.run import check_generates


@dataclass(frozen=True)
class Work:
    """`run(model, clock)` gives the times of its `parts`, or of more; a part has a name, and so many tokens or images
    that it is about."""

    run: Callable[[Any, Clock], Sequence[Span]]
    parts: tuple[tuple[str, int], ...]


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


def image_work(pixels: Tensor, batches: Sequence[int]) -> list[Work]:
    """Looking at so many images at once: each of `pixels` `[channels, height, width]`, as the model's image processor
    makes them. What they show changes nothing about the time."""
    return [
        Work(partial(_look, pixels=pixels.expand(count, *pixels.shape)), ((f"batch of {count}", count),))
        for count in batches
    ]


@torch.inference_mode()
def _look(model: Any, clock: Clock, pixels: Tensor) -> tuple[Span]:
    images = pixels.to(model.dtype)
    start = clock.now()
    run_model(model, images)
    return (clock.now() - start,)
