"""One model and its score."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from shiftadd_cli.runtime.opened import ModelInfo

S = TypeVar("S")


@dataclass(frozen=True)
class ModelResult(Generic[S]):
    """One model: its description, its score, and whether it was calibrated on the test data."""

    info: ModelInfo
    score: S
    calibrated_on_test: bool

    def to_dict(self) -> dict[str, Any]:
        """One flat table of JSON types; infinite values are null."""
        score: Any = self.score
        flat = asdict(self.info) | asdict(score) | {"calibrated_on_test": self.calibrated_on_test}
        return {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in flat.items()}
