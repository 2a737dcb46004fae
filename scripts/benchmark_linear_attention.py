"""Measures linear attention fitted to a pretrained model: errors of every layer, and the quality of mixed models.

For each feature map, and for the nearest tokens alone (`window`), every layer is fitted by itself. The divergence of
the model with only that layer linear, on the calibration texts that were held back, ranks the layers. The table has the
model with a growing share of layers linear, those of least divergence first.

    python scripts/benchmark_linear_attention.py demo --calibration wikitext2-valid.txt --test wikitext2-test.txt \\
        --maps window,exp,angular,binary --work out/linear-attention
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from shiftadd_cli.cli.flags import usage_error
from shiftadd_cli.cli.summary import table
from shiftadd_cli.data.text import load_text, sample_windows, text_windows, tokenise
from shiftadd_cli.data.windows import Windows, cut_windows
from shiftadd_cli.device import use_threads
from shiftadd_cli.errors import ShiftaddError
from shiftadd_cli.evaluation.perplexity import Score, score_models
from shiftadd_cli.progress import progress
from shiftadd_cli.reconstruction.attention import Fit, FitSettings, fit_feature_map
from shiftadd_cli.reconstruction.optimizer import hold_back
from shiftadd_cli.runtime.linear_attention.attention import Reach
from shiftadd_cli.runtime.linear_attention.feature_maps import MAPS, FeatureMap, make_map
from shiftadd_cli.runtime.linear_attention.module import Inputs, heads_of, is_attention, linearize, recorded
from shiftadd_cli.runtime.opened import open_any

WINDOW = "window"
# Layers whose inputs are in memory at once.
_TOGETHER = 5


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
        cache_share: of the softmax model's cache bytes, at `context` tokens.
    """

    map: str
    layers: tuple[int, ...]
    score: Score
    ratio: float
    cache_share: float


class DropDistant(FeatureMap):
    """Gives distant tokens no weight."""

    name = WINDOW

    def queries(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return query.new_zeros(*query.shape[:-1], 1), query.new_zeros(*query.shape[:-1], self.features)

    def keys(self, key: torch.Tensor) -> torch.Tensor:
        return key.new_zeros(*key.shape[:-1], self.features)

    def start(self, query: torch.Tensor, key: torch.Tensor, scaling: float, generator: torch.Generator) -> None:
        """There is nothing to set."""


def attentions(model: Any) -> dict[int, Any]:
    """Attention layers by number."""
    return {module.layer_idx: module for module in model.modules() if is_attention(module)}


def twin(model: Any, maps: Mapping[int, FeatureMap], reach: Reach) -> Any:
    """The model with these layers linear; it shares the weights of `model`."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    for index, module in attentions(copied).items():
        if index in maps:
            linearize(module, maps[index], reach)
    return copied


def fit_layers(
    model: Any, texts: torch.Tensor, name: str, reach: Reach, settings: FitSettings
) -> Iterator[tuple[int, FeatureMap, Fit]]:
    """Maps of all layers, fitted on windows of tokens `[texts, tokens]`."""
    layers = list(attentions(model).items())
    starts = range(0, len(layers), _TOGETHER)
    for start in progress(starts, len(starts), f"Fitting {name}"):
        part = layers[start : start + _TOGETHER]
        for (index, module), inputs in zip(part, record(model, [module for _, module in part], texts), strict=True):
            made: FeatureMap
            heads, kv_heads, size = heads_of(module)
            if name == WINDOW:
                made = DropDistant(heads, kv_heads, size, 1)
                fit = fit_feature_map(made, reach, inputs, module.o_proj, FitSettings(steps=0))
            else:
                made = make_map(name, heads, kv_heads, size)
                fit = fit_feature_map(made, reach, inputs, module.o_proj, settings)
            yield index, made, fit


@torch.no_grad()
def record(model: Any, modules: Sequence[Any], texts: torch.Tensor) -> list[list[Inputs]]:
    """The inputs of these attention layers for every text."""
    with ExitStack() as stack:
        inputs = [stack.enter_context(recorded(module)) for module in modules]
        for text in texts:
            model.base_model(text[None], use_cache=False)
    return inputs


def cache_share(model: Any, layers: int, reach: Reach, features: int, context: int) -> float:
    """The size of the cache relative to that of softmax layers, at a context. features: numbers of the linear state
    per key feature are one more than a head's, in 32 bits; keys and values have the model's dtype."""
    sizes = [heads_of(module) for module in attentions(model).values()]
    _, kv_heads, size = sizes[0]
    number = model.dtype.itemsize
    softmax = 2 * context * kv_heads * size * number
    near = min(context, reach.window + reach.sinks)
    linear = 2 * near * kv_heads * size * number + 4 * kv_heads * features * (size + 1)
    return ((len(sizes) - layers) * softmax + layers * min(linear, softmax)) / (len(sizes) * softmax)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--calibration", default="builtin", show_default=True, help="Text to fit on.")
@click.option("--test", default="builtin", show_default=True, help="Text to measure on.")
@click.option("--samples", default=12, show_default=True, help="Calibration windows.")
@click.option("--context", default=2048, show_default=True, help="Tokens per window, of both texts.")
@click.option("--max-tokens", default=40960, show_default=True, help="Tokens of the test text.")
@click.option("--maps", default=f"{WINDOW},{','.join(MAPS)}", show_default=True, help="Feature maps.")
@click.option("--window", default=64, show_default=True, help="Nearest tokens with softmax weights.")
@click.option("--sinks", default=4, show_default=True, help="First tokens with softmax weights.")
@click.option("--shares", default="0.25,0.5,0.75,1", show_default=True, help="Shares of linear layers.")
@click.option("--steps", default=FitSettings.steps, show_default=True, help="Steps of the fit.")
@click.option("--rate", default=FitSettings.rate, show_default=True, help="Learning rate of the fit.")
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
    rate: float,
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
    reach, settings = Reach(window, sinks), FitSettings(steps=steps, rate=rate, seed=seed)
    try:
        loaded = open_any(model).load("float32", torch.device("cpu"))
        tokenizer = loaded.tokenizer
        texts = sample_windows(
            load_text(calibration, split="calibration"), tokenizer, samples=samples, seq_len=context, seed=seed
        )
        tokens = tokenise(load_text(test, split="test").text, tokenizer)[:max_tokens]
        windows = text_windows(tokens, tokenizer, context, "`context`")
    except ShiftaddError as error:
        raise usage_error(error) from error
    held = cut_windows(texts[hold_back(samples)[1]].flatten(), context)
    original = ("original", loaded.model)
    layers: list[Layer] = []
    mixes: list[Mixed] = []
    for name in maps.split(","):
        made: dict[int, FeatureMap] = {}
        for index, feature_map, fit in fit_layers(loaded.model, texts, name, reach, settings):
            made[index] = feature_map
            layers.append(Layer(name, index, fit, divergence(loaded.model, {index: feature_map}, reach, held)))
            click.echo(describe(layers[-1]))
        own = sorted((layer for layer in layers if layer.map == name), key=lambda layer: layer.divergence)
        for share in map(float, shares.split(",")):
            picked = tuple(sorted(layer.index for layer in own[: round(share * len(own))]))
            mixed = twin(loaded.model, {index: made[index] for index in picked}, reach)
            (score,), reference = score_models([(name, mixed)], windows, batch_size=1, original=original)
            assert reference is not None
            features = next(iter(made.values())).features if name != WINDOW else 0
            mixes.append(
                Mixed(
                    name,
                    picked,
                    score,
                    score.perplexity / reference.perplexity,
                    cache_share(loaded.model, len(picked), reach, features, cache_context),
                )
            )
            click.echo(describe_mixes(mixes[-1:], cache_context))
            rows = {"layers": [asdict(row) for row in layers], "mixes": [asdict(row) for row in mixes]}
            (work / "linear_attention.json").write_text(json.dumps(rows, indent=2))
        torch.save({index: feature_map.state_dict() for index, feature_map in made.items()}, work / f"{name}.pt")
    click.echo(describe_mixes(mixes, cache_context))


def divergence(model: Any, maps: Mapping[int, FeatureMap], reach: Reach, windows: Windows) -> float:
    """KL of the model with these layers linear from the original, in nats per token."""
    (score,), _ = score_models(
        [("linear", twin(model, maps, reach))],
        windows,
        batch_size=1,
        original=("original", model),
        show_progress=False,
    )
    assert score.kl is not None
    return score.kl


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
