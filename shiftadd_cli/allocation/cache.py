"""Sensitivities cached between runs, so that another budget takes seconds.

There is one small JSON file per combination of inputs; candidates measured later are added to it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from shiftadd_cli.allocation.sensitivity import Sensitivities, SensitivityKind
from shiftadd_cli.bcq.choices import parse_choice
from shiftadd_cli.cache import CacheFile

# Increased whenever the same inputs give different sensitivities.
CACHE_VERSIONS: dict[SensitivityKind, int] = {"output": 5, "divergence": 4, "paper": 4}
TABLES_VERSION = 2


class SensitivityCache:
    """The cache file in `folder` for one combination of fingerprints, see `CacheFile`."""

    def __init__(self, folder: Path, kind: SensitivityKind, *fingerprints: str, tables: bool = False) -> None:
        """tables: those of embeddings and heads, which are `costs` of a file of their own."""
        version = f"{TABLES_VERSION} tables" if tables else str(CACHE_VERSIONS[kind])
        key = hashlib.sha256("\n".join((version, kind, *fingerprints)).encode()).hexdigest()
        self._file = CacheFile(
            folder / "sensitivities" / f"{key}.json",
            content="sensitivities",
            loss="so another budget will measure them again",
        )

    @property
    def path(self) -> Path:
        return self._file.path

    def load(self) -> Sensitivities | None:
        """The cached sensitivities; None if the file is missing or unreadable."""
        content = self._file.read()
        if content is None:
            return None
        try:
            values = json.loads(content)
            costs = {
                str(name): {parse_choice(bits): float(cost) for bits, cost in by_bits.items()}
                for name, by_bits in values["costs"].items()
            }
            return Sensitivities(costs, tuple(tuple(map(str, names)) for names in values["shared_inputs"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def keep(self, found: Sensitivities) -> Sensitivities:
        """Add `found` to the file and return the merged content; another process never reads a partial file."""
        before = self.load()
        costs = found.costs
        if before is not None and before.costs.keys() == costs.keys():
            costs = {name: {**before.costs[name], **by_bits} for name, by_bits in costs.items()}
        merged = Sensitivities(costs, found.shared_inputs)
        text = json.dumps({"costs": merged.costs, "shared_inputs": merged.shared_inputs})
        self._file.write(text.encode())
        return merged
