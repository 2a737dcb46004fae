"""The options of `shiftadd linearize`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shiftadd_cli.artifact.linear_attention import MAP_TENSORS
from shiftadd_cli.errors import RecipeError
from shiftadd_cli.reconstruction.attention import FitSettings
from shiftadd_cli.runtime.linear_attention.attention import Reach
from shiftadd_cli.sizes import parse_size

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
    steps: int = FitSettings.steps
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
            match = _RANGE.fullmatch(part.strip())
            numbers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
            # A range from a higher to a lower number is empty too.
            if not numbers:
                raise RecipeError(f"`layers` {self.layers!r} is not valid; give auto, all, or numbers such as 0-3,7.")
            named |= set(numbers)
        if missing := sorted(named - set(eligible)):
            raise RecipeError(
                f"Layer {missing[0]} (`layers`) has no attention that can be linear; those that have: "
                f"{', '.join(map(str, eligible))}."
            )
        return tuple(sorted(named))
