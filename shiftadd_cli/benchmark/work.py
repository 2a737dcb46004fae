"""The work that all models of a benchmark do in turns: prefill and decode, or classifying images."""

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
    """`run(model, clock)` returns the times of its `parts`, possibly followed by others; a part is a name and a number
    of tokens or images."""

    run: Callable[[Any, Clock], Sequence[Span]]
    parts: tuple[tuple[str, int], ...]


def text_work(tokens: Tensor, lengths: Sequence[int], new_tokens: int, batch: int) -> list[Work]:
    """Prefill of a prompt of each of these lengths, and decode after the shortest of them.

    tokens: `[n]`, at least as long as the longest prompt; a prompt is its first tokens, `batch` times. `prefill of N`
    lasts until the first new token, `decode` from there to the last, with a KV cache.
    """
    work = []
    for length in lengths:
        prompts = tokens[:length].expand(batch, length)
        prefill = f"prefill of {length}", batch * length
        if length == min(lengths):
            run = partial(time_generation, prompts=prompts, new_tokens=new_tokens)
            work.append(Work(run, (prefill, ("decode", batch * (new_tokens - 1)))))
        else:
            work.append(Work(partial(time_generation, prompts=prompts, new_tokens=1), (prefill,)))
    return work


def time_generation(model: Any, clock: Clock, prompts: Tensor, new_tokens: int) -> tuple[Span, Span]:
    """Times until the first new token, and from there to the last, for `prompts` `[batch, length]`.

    transformers generates greedily with its KV cache; no token ends a text before it reaches `new_tokens`.
    """
    check_generates(model)
    # The checkpoint's own generation settings must not stop early or add work, see `generation.run`.
    model.generation_config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    marks = _Marks(clock)
    start = clock.now()
    model.generate(prompts, attention_mask=torch.ones_like(prompts), logits_processor=LogitsProcessorList([marks]))
    assert len(marks.seen) == new_tokens
    return marks.seen[0] - start, marks.seen[-1] - marks.seen[0]


class _Marks(LogitsProcessor):
    """Records when the logits of each token are ready; unlike a streamer, this also works for batches."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seen: list[Span] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(self._clock.now())
        return scores


def image_work(pixels: Tensor, batches: Sequence[int]) -> list[Work]:
    """Classifying images at these batch sizes, each image `pixels` `[channels, height, width]` as the model's image
    processor makes it. The time does not depend on the content."""
    return [
        Work(partial(_time_images, pixels=pixels.expand(count, *pixels.shape)), ((f"batch of {count}", count),))
        for count in batches
    ]


@torch.inference_mode()
def _time_images(model: Any, clock: Clock, pixels: Tensor) -> tuple[Span]:
    images = pixels.to(model.dtype)
    start = clock.now()
    run_model(model, images)
    return (clock.now() - start,)
