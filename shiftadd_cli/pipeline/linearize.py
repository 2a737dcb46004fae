"""`shiftadd linearize`: some attention layers of a model get a state of constant size, fitted to softmax attention.

Feature maps are fitted layer by layer, each to the original's own inputs of that layer. The divergence of the model
with only that layer linear, measured on texts that no fit has seen, decides which layers stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shiftadd_cli.allocation.knapsack import knapsack
from shiftadd_cli.artifact.format import ArtifactFormat
from shiftadd_cli.artifact.linear_attention import LinearAttentionFormat
from shiftadd_cli.artifact.output import check_output
from shiftadd_cli.artifact.workspace import Workspace
from shiftadd_cli.data.text import load_text, sample_windows
from shiftadd_cli.data.windows import Windows
from shiftadd_cli.device import dtype_name
from shiftadd_cli.errors import LinearAttentionError
from shiftadd_cli.pipeline.final_check import check_checkpoint
from shiftadd_cli.pipeline.linear_layers import (
    Maps,
    cache_bytes,
    divergences,
    fit_layers,
    held_back_windows,
    layer_cache_bytes,
    linear_candidates,
    twin,
)
from shiftadd_cli.pipeline.linearize_settings import LinearizeSettings
from shiftadd_cli.progress import no_library_bar, progress
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.reconstruction.attention import Fit
from shiftadd_cli.runtime.linear_attention.module import LinearAttention, heads_of
from shiftadd_cli.runtime.opened import Opened, open_any
from shiftadd_cli.runtime.transformers_plugin import ShiftAddConfig
from shiftadd_cli.source.positions import window_length

REPORT_FILE = "linear_attention.json"
# Rounds in which a limit on the sum of single divergences is lowered until the measured divergence keeps it.
_ROUNDS = 6


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
    chosen: bool


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
        if opened.has_linear_attention:
            raise LinearAttentionError(f"{model} has linear attention already; give the model it was made from.")
        layers = tuple(linear_candidates(opened.skeleton()))
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
        return cls(opened, out, settings, overwrite, texts, layers, named)

    def run(self) -> Linearized:
        """Fit, choose, and write `out`, completely or not at all.

        Raises:
            LinearAttentionError: no choice of layers keeps to the budget.
            NumericalError: the result predicts something else when it is loaded.
        """
        # In the dtype of the files, so that nothing is rounded, and nothing grows.
        model, settings = self.opened.load(dtype_name(self.opened.stored_dtype)).model, self.settings
        wanted = self.layers if self.named is None else self.named
        fitted = list(progress(fit_layers(model, self.texts, wanted, settings), len(wanted), "Fitting attention"))
        maps = {number: feature_map for number, feature_map, _ in fitted}
        held = held_back_windows(self.texts)
        alone: dict[int, float] = {}
        if self.named is None:
            single = [{number: feature_map} for number, feature_map in maps.items()]
            alone = dict(zip(maps, divergences(model, single, settings.reach, held), strict=True))
        chosen, total = self._choose(model, maps, alone, held)
        layers = tuple(LayerResult(number, fit, alone.get(number), number in chosen) for number, _, fit in fitted)
        full, small = cache_bytes(model, (), settings), cache_bytes(model, chosen, settings)
        linearized = Linearized(settings, layers, total, small, full)
        self._write(model, {number: maps[number] for number in chosen}, linearized)
        return linearized

    def _choose(
        self, model: Any, maps: Maps, alone: Mapping[int, float], held: Windows
    ) -> tuple[tuple[int, ...], float]:
        """The linear layers, and the divergence of the model with all of them. alone: divergences of single layers."""
        settings = self.settings

        def together(layers: Sequence[int]) -> float:
            (value,) = divergences(model, [{number: maps[number] for number in layers}], settings.reach, held)
            return value

        if self.named is not None:
            return self.named, together(self.named)
        if settings.max_divergence is None:
            chosen = _within_cache(model, alone, settings)
            return chosen, together(chosen)
        limit = settings.max_divergence
        for _ in range(_ROUNDS):
            chosen = _within_divergence(alone, limit)
            if not chosen:
                break
            total = together(chosen)
            if total <= settings.max_divergence:
                return chosen, total
            # Divergences of single layers do not add up.
            limit = min(limit, sum(alone[number] for number in chosen))
            limit *= 0.95 * settings.max_divergence / total
        raise LinearAttentionError(
            f"No linear layers keep to a divergence of {settings.max_divergence} (one alone has "
            f"{min(alone.values()):.4f}); give a larger `max_divergence` or `window`."
        )

    def _write(self, model: Any, maps: Maps, linearized: Linearized) -> None:
        settings = self.settings
        linear = twin(model, maps, settings.reach)
        modules = {
            name: heads_of(module) for name, module in linear.named_modules() if isinstance(module, LinearAttention)
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


def _within_cache(model: Any, alone: Mapping[int, float], settings: LinearizeSettings) -> tuple[int, ...]:
    modules = linear_candidates(model)
    sizes = [
        {
            linear: float(layer_cache_bytes(modules[number], model.dtype, settings, linear=linear))
            for linear in (False, True)
        }
        for number in alone
    ]
    limit = settings.budget_bytes(cache_bytes(model, (), settings))
    if sum(min(pair.values()) for pair in sizes) > limit:
        raise LinearAttentionError(
            f"With all layers linear, the cache at {settings.context:,} tokens is larger than `cache_budget` "
            f"{settings.cache_budget}; give a larger one or a smaller `window`."
        )
    losses = [{False: 0.0, True: max(0.0, divergence)} for divergence in alone.values()]

    def fits(choice: Sequence[bool]) -> bool:
        return sum(pair[linear] for pair, linear in zip(sizes, choice, strict=True)) <= limit

    choice = knapsack(losses, sizes, limit, fits)
    return tuple(number for number, linear in zip(alone, choice, strict=True) if linear)


def _within_divergence(alone: Mapping[int, float], limit: float) -> tuple[int, ...]:
    """As many layers as their divergences allow: those of the smallest first, since all save as much."""
    chosen, total = [], 0.0
    for number, divergence in sorted(alone.items(), key=lambda item: item[1]):
        total += divergence
        if total > limit:
            break
        chosen.append(number)
    return tuple(sorted(chosen))
