"""The error message for an invalid recipe file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shiftadd_cli.errors import RecipeError
from shiftadd_cli.recipe import Recipe


def refusal(tmp_path: Path, content: str | bytes, **overrides: Any) -> str:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError) as caught:
        Recipe.load(str(path), overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message
