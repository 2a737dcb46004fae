"""Measures linear attention fitted to a pretrained model: errors of every layer, and the quality of mixed models.

For each feature map, and for the nearest tokens alone (`window`), every layer is fitted by itself. The divergence of
the model with only that layer linear, on the calibration texts that were held back, ranks the layers. The table has the
model with a growing share of layers linear, those of least divergence first.

    python scripts/benchmark_linear_attention.py demo --calibration wikitext2-valid.txt --test wikitext2-test.txt \\
        --maps window,exp,angular,binary --work out/linear-attention
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from shiftadd_cli.artifact.linear_attention import MAP_TENSORS
from shiftadd_cli.cli.flags import usage_error
from shiftadd_cli.cli.summary import table
from shiftadd_cli.data.text import load_text, sample_windows, text_windows, tokenise
from shiftadd_cli.device import use_threads
from shiftadd_cli.errors import ShiftaddError
from shiftadd_cli.evaluation.perplexity import Score, score_models
from shiftadd_cli.pipeline.linear_layers import (
    cache_bytes,
    divergences,
    fit_layers,
    held_back_windows,
    linear_candidates,
    twin,
)
from shiftadd_cli.pipeline.linearize_settings import LinearizeSettings
from shiftadd_cli.progress import progress
from shiftadd_cli.reconstruction.attention import Fit
from shiftadd_cli.runtime.opened import open_any


@dataclass(frozen=True)
class Layer:
    """One layer, linear by itself.

    Attributes:
        fit: errors of its output. divergence: of the model's predictions, in nats per token, on held-back texts.
    """

    map: str
    index: int
    fit: Fit
    divergence: float


@dataclass(frozen=True)
class Mixed:
    """A model with some linear layers.

    Attributes:
        cache_share: of the softmax model's cache bytes, at `--cache-context` tokens.
    """

    map: str
    layers: tuple[int, ...]
    score: Score
    ratio: float
    cache_share: float


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--calibration", default="builtin", show_default=True, help="Text to fit on.")
@click.option("--test", default="builtin", show_default=True, help="Text to measure on.")
@click.option("--samples", default=12, show_default=True, help="Calibration windows.")
@click.option("--context", default=2048, show_default=True, help="Tokens per window, of both texts.")
@click.option("--max-tokens", default=40960, show_default=True, help="Tokens of the test text.")
@click.option("--maps", default=",".join(MAP_TENSORS), show_default=True, help="Feature maps.")
@click.option("--window", default=64, show_default=True, help="Nearest tokens with softmax weights.")
@click.option("--sinks", default=4, show_default=True, help="First tokens with softmax weights.")
@click.option("--shares", default="0.25,0.5,0.75,1", show_default=True, help="Shares of linear layers.")
@click.option("--steps", default=LinearizeSettings.steps, show_default=True, help="Steps of the fit.")
@click.option("--seed", default=0, show_default=True, help="Random seed.")
@click.option("--cache-context", default=8192, show_default=True, help="Tokens at which cache sizes are compared.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/linear-attention"), show_default=True)
def main(
    model: str,
    calibration: str,
    test: str,
    samples: int,
    context: int,
    max_tokens: int,
    maps: str,
    window: int,
    sinks: int,
    shares: str,
    steps: int,
    seed: int,
    cache_context: int,
    threads: int | None,
    work: Path,
) -> None:
    """Measure linear attention in MODEL (an original, or a folder of ours)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    use_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    try:
        chosen = [
            LinearizeSettings(
                map=name,
                window=window,
                sinks=sinks,
                context=cache_context,
                samples=samples,
                seq_len=context,
                steps=steps,
                seed=seed,
            )
            for name in maps.split(",")
        ]
        loaded = open_any(model).load("float32", torch.device("cpu"))
        tokenizer = loaded.tokenizer
        texts = sample_windows(
            load_text(calibration, split="calibration"), tokenizer, samples=samples, seq_len=context, seed=seed
        )
        tokens = tokenise(load_text(test, split="test").text, tokenizer)[:max_tokens]
        windows = text_windows(tokens, tokenizer, context, "`context`")
    except ShiftaddError as error:
        raise usage_error(error) from error
    held = held_back_windows(texts)
    layers: list[Layer] = []
    mixes: list[Mixed] = []
    for settings in chosen:
        name, numbers = settings.map, list(linear_candidates(loaded.model))
        fits = fit_layers(loaded.model, texts, numbers, settings)
        fitted = list(progress(fits, len(numbers), f"Fitting {name}"))
        made = {index: feature_map for index, feature_map, _ in fitted}
        single = [{index: feature_map} for index, feature_map in made.items()]
        alone = divergences(loaded.model, single, settings.reach, held)
        own = [Layer(name, index, fit, value) for (index, _, fit), value in zip(fitted, alone, strict=True)]
        click.echo("\n".join(map(describe, own)))
        layers += own
        ranked = sorted(own, key=lambda layer: layer.divergence)
        for share in map(float, shares.split(",")):
            picked = tuple(sorted(layer.index for layer in ranked[: round(share * len(ranked))]))
            mixed = twin(loaded.model, {index: made[index] for index in picked}, settings.reach)
            (score,), reference = score_models(
                [(name, mixed)], windows, batch_size=1, original=("original", loaded.model)
            )
            assert reference is not None
            small, full = (cache_bytes(loaded.model, linear, settings) for linear in (picked, ()))
            mixes.append(Mixed(name, picked, score, score.perplexity / reference.perplexity, small / full))
            click.echo(describe_mixes(mixes[-1:], cache_context))
            rows = {"layers": [asdict(row) for row in layers], "mixes": [asdict(row) for row in mixes]}
            (work / "linear_attention.json").write_text(json.dumps(rows, indent=2))
    click.echo(describe_mixes(mixes, cache_context))


def describe(layer: Layer) -> str:
    fit = layer.fit
    return (
        f"{layer.map} in layer {layer.index}: error {fit.window_error:.4f} by near tokens, {fit.start_error:.4f} at "
        f"the start, {fit.error:.4f} fitted; KL {layer.divergence:.4f}"
    )


def describe_mixes(mixes: Sequence[Mixed], cache_context: int) -> str:
    header = ("map", "linear layers", "perplexity ratio", "KL, nats/token", f"cache at {cache_context:,} tokens")
    return table(
        header,
        [
            (
                row.map,
                str(len(row.layers)),
                f"{row.ratio:.3f}",
                f"{row.score.kl or 0:.4f}",
                f"{row.cache_share:.0%}",
            )
            for row in mixes
        ],
    )


if __name__ == "__main__":
    main()
