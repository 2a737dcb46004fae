"""Fits the feature map of a linear attention layer, so that the layer's output is that of softmax attention.

The loss is the squared error behind the output projection, similar to the attention transfer of LoLCATs (Zhang et al.
2024, arXiv 2410.10254, section 3.1). Only the feature map is fitted; the model's own weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from shiftadd_cli.reconstruction.optimizer import hold_back, rising_and_falling
from shiftadd_cli.runtime.linear_attention.attention import Reach, attend, tokens_within
from shiftadd_cli.runtime.linear_attention.feature_maps import FeatureMap
from shiftadd_cli.runtime.linear_attention.module import Inputs

Project = Callable[[Tensor], Tensor]
# Samples of queries and keys from which a map starts, per head.
_SAMPLES = 8192
# The root mean square of the numbers of queries and keys for which `FitSettings.rate` was chosen.
_TUNED_AT = 1.8
# Queries of the held-back texts on which errors are measured, per text.
_MEASURED = 64


@dataclass(frozen=True)
class FitSettings:
    """How a map is fitted.

    Attributes:
        steps: of gradient descent, each on some queries of one text; queries: their number.
        rate: the largest learning rate of Adam, of biases. seed: of the choice of texts and queries.
    """

    steps: int = 120
    queries: int = 192
    rate: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Fit:
    """Squared errors of the projected output on held-back texts, relative to the squares of that of softmax attention.

    Attributes:
        window_error: of the near tokens alone; start_error: with the map as it started; error: with the fitted map.
    """

    window_error: float
    start_error: float
    error: float


def fit_feature_map(
    feature_map: FeatureMap, reach: Reach, texts: Sequence[Inputs], project: Project, settings: FitSettings
) -> Fit:
    """Start a map from the texts of an attention layer and fit it, in place.

    Args:
        texts: two or more, of one row and of equal length, longer than what is near.
        project: the layer's output projection, of `[rows, tokens, heads * size]`.

    Raises ValueError if no token of the texts is distant.
    """
    tokens = texts[0].query.shape[2]
    loss = _Loss(feature_map, reach, project)
    if tokens <= loss.first_distant:
        raise ValueError(f"texts of {tokens} tokens have no distant tokens for {loss.first_distant} near ones")
    tuned, held = hold_back(len(texts))
    generator = torch.Generator().manual_seed(settings.seed)
    _start(feature_map, [texts[index] for index in tuned], generator)
    measured = torch.linspace(loss.first_distant, tokens - 1, min(_MEASURED, tokens - loss.first_distant)).long()
    held_texts = [texts[index] for index in held]
    window_error = loss.measure(held_texts, measured, distant=False)
    start_error = loss.measure(held_texts, measured)
    if settings.steps and any(True for _ in feature_map.parameters()):
        _descend(loss, [texts[index] for index in tuned], settings, generator)
    return Fit(window_error, start_error, loss.measure(held_texts, measured))


@torch.enable_grad()
def _descend(loss: _Loss, texts: Sequence[Inputs], settings: FitSettings, generator: torch.Generator) -> None:
    groups = [
        {"params": [parameter], "lr": _rate(name, texts[0], settings)}
        for name, parameter in loss.feature_map.named_parameters()
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rising_and_falling(settings.steps))
    tokens = texts[0].query.shape[2]
    for _ in range(settings.steps):
        text = texts[int(torch.randint(len(texts), (1,), generator=generator))]
        queries = torch.randint(loss.first_distant, tokens, (settings.queries,), generator=generator).sort().values
        error, energy = loss(text, queries)
        optimizer.zero_grad()
        (error / energy).backward()
        optimizer.step()
        schedule.step()


def _rate(name: str, text: Inputs, settings: FitSettings) -> float:
    """The learning rate of a parameter. Factors of queries and keys move less where these are large."""
    if not name.endswith(("weight", "turn")):
        return settings.rate
    inputs = text.query if name.startswith("query") else text.key
    return settings.rate * _TUNED_AT / max(float(inputs.float().square().mean().sqrt()), 1e-6)


def _start(feature_map: FeatureMap, texts: Sequence[Inputs], generator: torch.Generator) -> None:
    share = max(1, _SAMPLES // len(texts))

    def sampled(tensors: Iterable[Tensor]) -> Tensor:
        """`[heads, samples, size]`."""
        parts = []
        for tensor in tensors:
            positions = torch.randperm(tensor.shape[2], generator=generator)[:share]
            parts.append(tensor[0, :, positions.to(tensor.device)])
        return torch.cat(parts, 1)

    query, key = sampled(text.query for text in texts), sampled(text.key for text in texts)
    feature_map.start(query, key, texts[0].scaling, generator)


class _Loss:
    """Squared error of the projected output of some queries of a text."""

    def __init__(self, feature_map: FeatureMap, reach: Reach, project: Project) -> None:
        self.feature_map, self._reach, self._project = feature_map, reach, project
        # The first query that has a distant token.
        self.first_distant = reach.window + reach.sinks

    def __call__(self, text: Inputs, queries: Tensor, *, distant: bool = True) -> tuple[Tensor, Tensor]:
        """The error, and the energy of the softmax layer's output. queries: positions; distant: whether distant tokens
        take part."""
        query, key, value = text.query[:, :, queries].float(), text.key.float(), text.value.float()
        positions = torch.arange(key.shape[2])
        near, far = tokens_within(self._reach, queries, positions, torch.zeros(1, dtype=torch.long))

        def projected(mixed: Tensor) -> Tensor:
            return self._project(mixed.transpose(1, 2).flatten(2).to(text.value.dtype)).float()

        def softmax(mask: Tensor) -> Tensor:
            return scaled_dot_product_attention(query, key, value, mask, scale=text.scaling, enable_gqa=True)

        with torch.no_grad():
            target = projected(softmax(near | far))
        mixed = attend(query, key, value, near, far, self.feature_map, text.scaling) if distant else softmax(near)
        return (projected(mixed) - target).square().sum(), target.square().sum()

    @torch.no_grad()
    def measure(self, texts: Sequence[Inputs], queries: Tensor, *, distant: bool = True) -> float:
        pairs = [self(text, queries, distant=distant) for text in texts]
        return float(sum(error for error, _ in pairs) / sum(energy for _, energy in pairs))
