"""Recipe fields that are newer than the first measured rows."""

from __future__ import annotations

from typing import Any

# By field, the value that equals its absence: rows keep their names.
LATER: dict[str, Any] = {"primitive": "bcq", "distill_epochs": 0, "drift": 0.0}
