"""Sensitivities kept between runs, so that another budget costs seconds.

One small JSON file for each combination of what decides them; candidates measured later join those that are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from shiftadd_cli.allocation.sensitivity import Sensitivities, SensitivityKind
from shiftadd_cli.bcq.choices import parse_choice

# Raised whenever sensitivities of the same inputs come out differently.
CACHE_VERSIONS: dict[SensitivityKind, int] = {"output": 5, "divergence": 4, "paper": 4}


def cache_folder() -> Path:
    """$SHIFTADD_CACHE, or `~/.cache/shiftadd`."""
    return Path(os.environ.get("SHIFTADD_CACHE") or Path.home() / ".cache" / "shiftadd")


class SensitivityCache:
    """The file for one combination of fingerprints in `folder`, which is made here: a place that cannot be written to
    shows before the work and not after it."""

    def __init__(self, folder: Path, kind: SensitivityKind, *fingerprints: str) -> None:
        key = hashlib.sha256("\n".join((str(CACHE_VERSIONS[kind]), kind, *fingerprints)).encode()).hexdigest()
        self.path = folder / "sensitivities" / f"{key}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def load(self) -> Sensitivities | None:
        """What was kept; None if there is nothing or nothing readable."""
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            costs = {
                str(name): {parse_choice(bits): float(cost) for bits, cost in each.items()}
                for name, each in values["costs"].items()
            }
            return Sensitivities(costs, tuple(tuple(map(str, names)) for names in values["shared_inputs"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def keep(self, found: Sensitivities) -> Sensitivities:
        """Add what was found and return all that is kept; another process never reads a part of it."""
        before = self.load()
        costs = found.costs
        if before is not None and before.costs.keys() == costs.keys():
            costs = {name: {**before.costs[name], **each} for name, each in costs.items()}
        whole = Sensitivities(costs, found.shared_inputs)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
            json.dump({"costs": whole.costs, "shared_inputs": whole.shared_inputs}, file)
        os.replace(file.name, self.path)
        return whole
