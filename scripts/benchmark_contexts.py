"""Measures decoding by the length of the context: time per token and bytes of the cache, of several models in turn.

The first model is the one that the others are compared with:

    python scripts/benchmark_contexts.py demo out/linear --contexts 512,2048,4096,8192
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import click
import torch
from transformers import DynamicCache

from shiftadd_cli.cli.flags import usage_error
from shiftadd_cli.cli.summary import table
from shiftadd_cli.device import use_threads
from shiftadd_cli.errors import ShiftaddError
from shiftadd_cli.runtime.kv_cache import growing_cache
from shiftadd_cli.runtime.linear_attention.cache_layer import LinearLayer
from shiftadd_cli.runtime.opened import open_any
from shiftadd_cli.sizes import size

# Tokens of a prompt that are read at a time.
_CHUNK = 512


@dataclass
class Run:
    """One model with a cache, and the seconds of each token decoded with it."""

    name: str
    model: Any
    cache: DynamicCache
    seconds: list[float] = field(default_factory=list)

    @torch.inference_mode()
    def read(self, tokens: torch.Tensor) -> None:
        """Prefill with tokens `[1, tokens]`."""
        for part in tokens.split(_CHUNK, dim=1):
            self.model(part, past_key_values=self.cache, logits_to_keep=1)

    @torch.inference_mode()
    def decode(self, token: torch.Tensor) -> None:
        """Decode one token `[1, 1]`."""
        start = time.perf_counter()
        self.model(token, past_key_values=self.cache)
        self.seconds.append(time.perf_counter() - start)


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of everything that the layers of a cache need for the next token."""
    tensors: list[torch.Tensor] = []
    layers: list[Any] = cache.layers
    for layer in layers:
        tensors += [layer.keys, layer.values]
        if isinstance(layer, LinearLayer):
            tensors += [layer.sink_keys, layer.sink_values, layer.state.values, layer.state.weights]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(models: Sequence[tuple[str, Any]], context: int, new_tokens: int) -> list[Run]:
    """Runs of all models on the same random tokens, decoding in turn."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(model.config.vocab_size for _, model in models)
    tokens = torch.randint(vocabulary, (1, context), generator=generator)
    runs = []
    for name, model in models:
        cache = growing_cache(model)
        assert cache is not None, "a decoder with a cache of transformers"
        runs.append(Run(name, model, cache))
        runs[-1].read(tokens)
    for number in range(new_tokens):
        for run in runs:
            run.decode(tokens[:, number : number + 1])
    return runs


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, required=True)
@click.option("--contexts", default="512,2048,4096,8192", show_default=True, help="Tokens before the first new one.")
@click.option("--new-tokens", default=32, show_default=True, help="Tokens to decode at each context.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads.")
def main(models: tuple[str, ...], contexts: str, new_tokens: int, threads: int | None) -> None:
    """Measure MODELS (originals, or folders of ours); ratios are to the first."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    use_threads(threads)
    try:
        loaded = [(name, open_any(name).load().model) for name in models]
    except ShiftaddError as error:
        raise usage_error(error) from error
    rows = []
    for context in map(int, contexts.split(",")):
        runs = measure(loaded, context, new_tokens)
        for run in runs:
            ratio = median(first / own for first, own in zip(runs[0].seconds, run.seconds, strict=True))
            rows.append(
                (
                    f"{context:,}",
                    run.name,
                    size(cache_bytes(run.cache)),
                    f"{1 / median(run.seconds):.1f}",
                    f"{ratio:.2f} x",
                )
            )
    click.echo(table(("context", "model", "cache", "decode, tokens/s", "ratio"), rows))


if __name__ == "__main__":
    main()
