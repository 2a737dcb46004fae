"""Sensitivities kept between runs, so that another budget costs seconds.

One small JSON file for each combination of what decides them; candidates measured later join those that are there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from pathlib import Path

from shiftadd_cli.allocation.sensitivity import Sensitivities, SensitivityKind
from shiftadd_cli.artifact.durable import replace_file
from shiftadd_cli.bcq.choices import parse_choice
from shiftadd_cli.paths import expanded

# Raised whenever sensitivities of the same inputs come out differently.
CACHE_VERSIONS: dict[SensitivityKind, int] = {"output": 5, "divergence": 4, "paper": 4}


def cache_folder() -> Path:
    """$SHIFTADD_CACHE, or `~/.cache/shiftadd`."""
    return expanded(os.environ.get("SHIFTADD_CACHE") or "~/.cache/shiftadd")


class SensitivityCache:
    """The file for one combination of fingerprints in `folder`, which is made here.

    It only saves time. Where the folder cannot be written, a warning says so once, and nothing is kept.
    """

    def __init__(self, folder: Path, kind: SensitivityKind, *fingerprints: str) -> None:
        key = hashlib.sha256("\n".join((str(CACHE_VERSIONS[kind]), kind, *fingerprints)).encode()).hexdigest()
        self.path = folder / "sensitivities" / f"{key}.json"
        self._usable = True
        try:
            if folder.parts[:1] and folder.parts[0].startswith("~"):
                raise FileNotFoundError(errno.ENOENT, "there is no such home folder")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path.parent, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as failure:
            self._give_up(failure)

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
        if self._usable:
            text = json.dumps({"costs": whole.costs, "shared_inputs": whole.shared_inputs})
            try:
                replace_file(self.path, text.encode())
            except OSError as failure:
                self._give_up(failure)
        return whole

    def _give_up(self, failure: OSError) -> None:
        self._usable = False
        print(
            f"Warning: sensitivities cannot be kept in {self.path.parent} ({failure.strerror or failure}), so another "
            "budget will measure them again; set SHIFTADD_CACHE to a folder that you may write.",
            file=sys.stderr,
            flush=True,
        )
