"""How the next token is chosen, and the upper limit of new tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shiftadd_cli.errors import RecipeError


@dataclass(frozen=True)
class Sampling:
    """Settings of a generation; raises RecipeError for invalid values.

    Attributes:
        max_new_tokens: upper limit of new tokens.
        temperature: divisor of the logits before a token is drawn; 0 takes the likeliest.
        top_p: draw among the likeliest tokens that together have this probability; 1 draws among all.
        seed: of the draws; 0 to 2**63 - 1.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RecipeError(f"`max_new_tokens` {self.max_new_tokens} generates no text; give 1 or more.")
        if not 0 <= self.temperature < math.inf:
            raise RecipeError(
                f"`temperature` {self.temperature:g} is not valid; give 0 (always the likeliest) or more."
            )
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"`top_p` {self.top_p:g} is not valid; give a probability above 0 and up to 1.")
        if self.top_p < 1 and self.temperature == 0:
            raise RecipeError("`top_p` changes nothing at temperature 0; give a `temperature` as well, such as 0.7.")
        if not 0 <= self.seed < 1 << 63:
            raise RecipeError(f"`seed` {self.seed} is not valid; give a number from 0 to 2**63 - 1.")
