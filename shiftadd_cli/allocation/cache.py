"""Sensitivities kept between runs, so that another budget costs seconds.

One small JSON file for each combination of what decides them; candidates measured later join those that are there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from shiftadd_cli.allocation.sensitivity import Sensitivities, SensitivityKind
from shiftadd_cli.bcq.choices import parse_choice
from shiftadd_cli.cache import CacheFile

# Raised whenever sensitivities of the same inputs come out differently.
CACHE_VERSIONS: dict[SensitivityKind, int] = {"output": 5, "divergence": 4, "paper": 4}


class SensitivityCache:
    """The file for one combination of fingerprints in `folder`, see `CacheFile`."""

    def __init__(self, folder: Path, kind: SensitivityKind, *fingerprints: str) -> None:
        key = hashlib.sha256("\n".join((str(CACHE_VERSIONS[kind]), kind, *fingerprints)).encode()).hexdigest()
        self._file = CacheFile(
            folder / "sensitivities" / f"{key}.json",
            content="sensitivities",
            loss="so another budget will measure them again",
        )

    @property
    def path(self) -> Path:
        return self._file.path

    def load(self) -> Sensitivities | None:
        """What was kept; None if there is nothing or nothing readable."""
        content = self._file.read()
        if content is None:
            return None
        try:
            values = json.loads(content)
            costs = {
                str(name): {parse_choice(bits): float(cost) for bits, cost in each.items()}
                for name, each in values["costs"].items()
            }
            return Sensitivities(costs, tuple(tuple(map(str, names)) for names in values["shared_inputs"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def keep(self, found: Sensitivities) -> Sensitivities:
        """Add what was found and return all that is kept; another process never reads a part of it."""
        before = self.load()
        costs = found.costs
        if before is not None and before.costs.keys() == costs.keys():
            costs = {name: {**before.costs[name], **each} for name, each in costs.items()}
        whole = Sensitivities(costs, found.shared_inputs)
        text = json.dumps({"costs": whole.costs, "shared_inputs": whole.shared_inputs})
        self._file.write(text.encode())
        return whole
