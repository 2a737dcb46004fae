"""`shiftadd linearize`: some attention layers of a model get a state of constant size, fitted to softmax attention.

Feature maps are fitted layer by layer, each to the original's own inputs of that layer. The divergence of the model
with only that layer linear, measured on texts that no fit has seen, decides which layers stay as they are.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shiftadd_cli.allocation.knapsack import knapsack
from shiftadd_cli.artifact.format import ArtifactFormat
from shiftadd_cli.artifact.linear_attention import MAP_TENSORS, LinearAttentionFormat
from shiftadd_cli.artifact.output import check_output
from shiftadd_cli.artifact.workspace import Workspace
from shiftadd_cli.data.text import load_text, sample_windows
from shiftadd_cli.data.windows import Windows, cut_windows
from shiftadd_cli.device import dtype_name
from shiftadd_cli.errors import LinearAttentionError, RecipeError
from shiftadd_cli.evaluation.perplexity import score_models
from shiftadd_cli.pipeline.final_check import check_checkpoint
from shiftadd_cli.progress import no_library_bar, progress
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.reconstruction.attention import Fit, FitSettings, fit_feature_map
from shiftadd_cli.reconstruction.optimizer import hold_back
from shiftadd_cli.runtime.linear_attention.attention import Reach
from shiftadd_cli.runtime.linear_attention.feature_maps import FeatureMap, make_map
from shiftadd_cli.runtime.linear_attention.module import (
    Inputs,
    check_cache,
    heads_of,
    is_attention,
    linearize,
    recorded,
)
from shiftadd_cli.runtime.opened import Opened, open_any
from shiftadd_cli.runtime.transformers_plugin import ShiftAddConfig
from shiftadd_cli.sizes import parse_size
from shiftadd_cli.source.positions import window_length

REPORT_FILE = "linear_attention.json"
# Inputs of layers that are in memory at once, in bytes; those of one layer may be more.
_INPUT_BYTES = 1 << 30
# Rounds in which a limit on the sum of single divergences is lowered until the measured divergence keeps it.
_ROUNDS = 6
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)%")
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


@dataclass(frozen=True)
class LinearizeSettings:
    """The options of `shiftadd linearize`.

    Attributes:
        map: feature map, see `runtime.linear_attention.feature_maps`.
        window, sinks: see `Reach`.
        layers: `all`, numbers such as `0-3,7`, or `auto`, which keeps to `cache_budget` or `max_divergence`.
        cache_budget: upper limit on the cache at `context` tokens, as a share of the original's (`50%`) or a size.
        max_divergence: upper limit on the divergence on held-back texts, in nats per token, instead of the former.
        calibration, samples, seq_len, seed: texts to fit on, as for `quantize`.
        steps: of each fit.
    """

    map: str = "exp"
    window: int = 64
    sinks: int = 4
    layers: str = "auto"
    cache_budget: str = "50%"
    max_divergence: float | None = None
    context: int = 8192
    calibration: str = "builtin"
    samples: int = 16
    seq_len: int = 2048
    steps: int = 120
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises RecipeError for a value that is not valid."""
        if self.map not in MAP_TENSORS:
            raise RecipeError(f"`map` {self.map!r} is not known; give one of {', '.join(MAP_TENSORS)}.")
        least = {"window": 1, "sinks": 0, "context": 1, "samples": 2, "seq_len": 2, "steps": 0, "seed": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise RecipeError(f"`{name}` {getattr(self, name)} is not valid; give at least {lowest}.")
        if self.seq_len <= self.reach.window + self.reach.sinks:
            raise RecipeError(
                f"Texts of {self.seq_len} tokens (`seq_len`) have no tokens beyond {self.window} nearest ones "
                f"(`window`) and {self.sinks} `sinks`; give a larger `seq_len` or a smaller `window`."
            )
        if self.max_divergence is not None and not self.max_divergence > 0:
            raise RecipeError(f"`max_divergence` {self.max_divergence} is not valid; give a number above 0.")
        self.budget_bytes(1)

    @property
    def reach(self) -> Reach:
        """Which tokens are near."""
        return Reach(self.window, self.sinks)

    def budget_bytes(self, full: int) -> float:
        """The cache budget in bytes, for an original's cache of `full` bytes."""
        share = _PERCENT.fullmatch(self.cache_budget)
        size = parse_size(self.cache_budget)
        if share is None and size is None:
            raise RecipeError(
                f"`cache_budget` {self.cache_budget!r} is not valid; give a share such as 50% or a size such as 20MB."
            )
        return float(share[1]) / 100 * full if share is not None else float(size or 0)

    def numbers(self, eligible: Sequence[int]) -> tuple[int, ...] | None:
        """The layers that are named; None for `auto`. Raises RecipeError for layers that are not `eligible`."""
        if self.layers == "auto":
            return None
        if self.layers == "all":
            return tuple(eligible)
        named: set[int] = set()
        for part in self.layers.split(","):
            if (match := _RANGE.fullmatch(part.strip())) is None:
                raise RecipeError(f"`layers` {self.layers!r} is not valid; give auto, all, or numbers such as 0-3,7.")
            named |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
        if missing := sorted(named - set(eligible)) or ([] if named else [0]):
            raise RecipeError(
                f"Layer {missing[0]} (`layers`) has no attention that can be linear; those that have: "
                f"{', '.join(map(str, eligible))}."
            )
        return tuple(sorted(named))


@dataclass(frozen=True)
class LayerResult:
    """A fitted layer.

    Attributes:
        divergence: of the model with only this layer linear from the original, on held-back texts, in nats per token;
            None if the layers were named.
        chosen: whether the layer is linear in the result.
    """

    layer: int
    fit: Fit
    divergence: float | None
    chosen: bool = False


@dataclass(frozen=True)
class Linearized:
    """The result, also in `linear_attention.json`.

    Attributes:
        divergence: of the result from the original on held-back texts, in nats per token.
        cache_bytes, original_cache_bytes: of one text of `settings.context` tokens.
    """

    settings: LinearizeSettings
    layers: tuple[LayerResult, ...]
    divergence: float
    cache_bytes: int
    original_cache_bytes: int

    @property
    def chosen(self) -> tuple[int, ...]:
        """Numbers of the linear layers."""
        return tuple(result.layer for result in self.layers if result.chosen)


@dataclass
class LinearizeJob:
    """A run; created by `prepare`.

    Attributes:
        named: the layers to make linear; None if the run chooses them.
        layers: numbers of the layers that can be linear.
    """

    opened: Opened
    out: Path
    settings: LinearizeSettings
    overwrite: bool
    texts: Tensor
    layers: tuple[int, ...]
    named: tuple[int, ...] | None

    @classmethod
    def prepare(cls, model: str, out: Path, settings: LinearizeSettings, *, overwrite: bool = False) -> LinearizeJob:
        """Every check that headers and texts allow.

        Raises ShiftaddError with one sentence that says what to do.
        """
        opened = open_any(model)
        tokenizer = opened.load_tokenizer()
        skeleton = opened.skeleton()
        if opened.has_linear_attention:
            raise LinearAttentionError(f"{model} has linear attention already; give the model it was made from.")
        refusals: list[str] = []
        layers = []
        for number, module in attention_layers(skeleton).items():
            try:
                heads_of(module)
                check_cache(module)
            except LinearAttentionError as refusal:
                refusals.append(str(refusal))
            else:
                layers.append(number)
        if not layers:
            raise LinearAttentionError(
                refusals[0]
                if refusals
                else f"{type(skeleton).__name__} has no attention layers with the interface of transformers, so "
                "there is nothing to make linear."
            )
        named = settings.numbers(layers)
        length = window_length(settings.seq_len, settings.seq_len, {model: opened.positions}, "`seq_len`")
        local = Path(model) if Path(model).exists() else None
        check_output(out, local, overwrite=overwrite, expected_bytes=opened.file_bytes)
        texts = sample_windows(
            load_text(settings.calibration, split="calibration", tokenizer=tokenizer),
            tokenizer,
            samples=settings.samples,
            seq_len=length,
            seed=settings.seed,
        )
        return cls(opened, out, settings, overwrite, texts, tuple(layers), named)

    def run(self) -> Linearized:
        """Fit, choose, and write `out`, completely or not at all.

        Raises:
            LinearAttentionError: no choice of layers keeps to the budget.
            NumericalError: the result predicts something else when it is loaded.
        """
        # In the dtype of the files, so that nothing is rounded, and nothing grows.
        model, settings = self.opened.load(dtype_name(self.opened.stored_dtype)).model, self.settings
        wanted = self.layers if self.named is None else self.named
        _, held = hold_back(len(self.texts))
        held_texts = cut_windows(self.texts[held].flatten(), self.texts.shape[1])
        maps: dict[int, FeatureMap] = {}
        results: list[LayerResult] = []
        for number, feature_map, fit in progress(
            fit_layers(model, self.texts, wanted, settings), len(wanted), "Fitting attention"
        ):
            maps[number] = feature_map
            alone = None
            if self.named is None:
                alone = divergence(model, {number: feature_map}, settings.reach, held_texts)
            results.append(LayerResult(number, fit, alone))
        chosen, total = self._choose(model, maps, results, held_texts)
        full, small = cache_bytes(model, (), settings), cache_bytes(model, chosen, settings)
        layers = tuple(replace(result, chosen=result.layer in chosen) for result in results)
        linearized = Linearized(settings, layers, total, small, full)
        self._write(model, {number: maps[number] for number in chosen}, linearized)
        return linearized

    def _choose(
        self, model: Any, maps: Mapping[int, FeatureMap], results: Sequence[LayerResult], held: Windows
    ) -> tuple[tuple[int, ...], float]:
        """The linear layers, and the divergence of the model with all of them."""
        settings, reach = self.settings, self.settings.reach
        if self.named is not None:
            return self.named, divergence(model, maps, reach, held)
        if settings.max_divergence is None:
            chosen = _within_cache(model, results, settings)
            return chosen, divergence(model, {number: maps[number] for number in chosen}, reach, held)
        limit = settings.max_divergence
        for _ in range(_ROUNDS):
            chosen = _within_divergence(results, limit)
            if not chosen:
                break
            total = divergence(model, {number: maps[number] for number in chosen}, reach, held)
            if total <= settings.max_divergence:
                return chosen, total
            # Divergences of single layers do not add up.
            limit = min(limit, sum(_divergence_of(results, number) for number in chosen))
            limit *= 0.95 * settings.max_divergence / total
        least = min(_divergence_of(results, result.layer) for result in results)
        raise LinearAttentionError(
            f"No linear layers keep to a divergence of {settings.max_divergence} (one alone has {least:.4f}); give a "
            "larger `max_divergence` or `window`."
        )

    def _write(self, model: Any, maps: Mapping[int, FeatureMap], linearized: Linearized) -> None:
        settings = self.settings
        linear = twin(model, maps, settings.reach)
        modules = {
            name: heads_of(module)
            for name, module in linear.named_modules()
            if is_attention(module) and module.layer_idx in maps
        }
        entry = LinearAttentionFormat(settings.map, settings.window, settings.sinks, modules)
        present = getattr(model.config, "quantization_config", None)
        form = (
            # Values that would be common to compressed modules, of which there are none.
            ArtifactFormat(Recipe.load("default").at(3), {})
            if present is None
            else ArtifactFormat.from_dict(present.to_dict())
        )
        linear.config.quantization_config = ShiftAddConfig(**replace(form, linear_attention=entry).to_dict())
        sample = self.texts[:1]
        with torch.no_grad():
            expected = linear(sample).logits
        with Workspace(self.out, resume=False) as workspace:
            with no_library_bar():
                linear.save_pretrained(workspace.artifact)
            self.opened.save_companions(workspace.artifact)
            report = workspace.artifact / REPORT_FILE
            report.write_text(json.dumps(asdict(linearized), indent=2) + "\n", encoding="utf-8")
            check_checkpoint(workspace.artifact, sample, expected)
            workspace.publish(overwrite=self.overwrite)


def attention_layers(model: Any) -> dict[int, Any]:
    """Attention layers with the interface of transformers, by number."""
    return {module.layer_idx: module for module in model.modules() if is_attention(module)}


def twin(model: Any, maps: Mapping[int, FeatureMap], reach: Reach) -> Any:
    """The model with these layers linear; it shares the weights of `model`."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    for number, module in attention_layers(copied).items():
        if number in maps:
            linearize(module, maps[number], reach)
    return copied


def fit_layers(
    model: Any, texts: Tensor, layers: Sequence[int], settings: LinearizeSettings
) -> Iterator[tuple[int, FeatureMap, Fit]]:
    """Maps of these layers, fitted on windows of tokens `[texts, tokens]`."""
    modules = attention_layers(model)
    heads = heads_of(modules[layers[0]])
    one = texts.numel() * (heads.queries + 2 * heads.keys) * heads.size * model.dtype.itemsize
    together = max(1, _INPUT_BYTES // one)
    fit_settings = FitSettings(steps=0 if settings.map == "window" else settings.steps, seed=settings.seed)
    for start in range(0, len(layers), together):
        part = layers[start : start + together]
        for number, inputs in zip(part, record(model, [modules[number] for number in part], texts), strict=True):
            feature_map, project = make_map(settings.map, heads_of(modules[number])), modules[number].o_proj
            yield number, feature_map, fit_feature_map(feature_map, settings.reach, inputs, project, fit_settings)


@torch.no_grad()
def record(model: Any, modules: Sequence[Any], texts: Tensor) -> list[list[Inputs]]:
    """The inputs of these attention layers for every text."""
    with ExitStack() as stack:
        inputs = [stack.enter_context(recorded(module)) for module in modules]
        for text in texts:
            model.base_model(text[None], use_cache=False)
    return inputs


def divergence(model: Any, maps: Mapping[int, FeatureMap], reach: Reach, windows: Windows) -> float:
    """KL of the model with these layers linear from the original, in nats per token."""
    linear = [("linear", twin(model, maps, reach))]
    (score,), _ = score_models(linear, windows, batch_size=1, original=("original", model), show_progress=False)
    assert score.kl is not None
    return score.kl


def layer_cache_bytes(module: Any, dtype: torch.dtype, settings: LinearizeSettings, *, linear: bool) -> int:
    """Bytes that one attention layer caches for a text of `settings.context` tokens."""
    heads = heads_of(module)
    token = 2 * heads.keys * heads.size * dtype.itemsize
    if not linear:
        return settings.context * token
    features = make_map(settings.map, heads).features if settings.map != "window" else 0
    state = 4 * heads.keys * features * (heads.size + 1)
    return min(settings.context, settings.window + settings.sinks) * token + state


def cache_bytes(model: Any, linear: Sequence[int], settings: LinearizeSettings) -> int:
    """Bytes that all attention layers which keep all tokens cache, with these layers linear."""
    total = 0
    for number, module in attention_layers(model).items():
        try:
            check_cache(module)
            total += layer_cache_bytes(module, model.dtype, settings, linear=number in linear)
        except LinearAttentionError:
            continue
    return total


def _divergence_of(results: Sequence[LayerResult], number: int) -> float:
    (value,) = (result.divergence for result in results if result.layer == number)
    assert value is not None, "measured unless the layers are named"
    return value


def _within_cache(model: Any, results: Sequence[LayerResult], settings: LinearizeSettings) -> tuple[int, ...]:
    modules = attention_layers(model)
    sizes = [
        {
            linear: float(layer_cache_bytes(modules[result.layer], model.dtype, settings, linear=linear))
            for linear in (False, True)
        }
        for result in results
    ]
    full = cache_bytes(model, (), settings)
    # Layers that cannot be linear are outside the choice.
    fixed = full - sum(pair[False] for pair in sizes)
    limit = settings.budget_bytes(full) - fixed
    if sum(min(pair.values()) for pair in sizes) > limit:
        raise LinearAttentionError(
            f"With all layers linear, the cache at {settings.context:,} tokens is larger than `cache_budget` "
            f"{settings.cache_budget}; give a larger one or a smaller `window`."
        )
    losses = [{False: 0.0, True: max(0.0, _divergence_of(results, result.layer))} for result in results]

    def fits(choice: Sequence[bool]) -> bool:
        return sum(pair[linear] for pair, linear in zip(sizes, choice, strict=True)) <= limit

    choice = knapsack(losses, sizes, limit, fits)
    return tuple(result.layer for result, linear in zip(results, choice, strict=True) if linear)


def _within_divergence(results: Sequence[LayerResult], limit: float) -> tuple[int, ...]:
    """As many layers as their divergences allow: those of the smallest first, since all save as much."""
    chosen, total = [], 0.0
    for result in sorted(results, key=lambda result: _divergence_of(results, result.layer)):
        total += _divergence_of(results, result.layer)
        if total > limit:
            break
        chosen.append(result.layer)
    return tuple(sorted(chosen))
