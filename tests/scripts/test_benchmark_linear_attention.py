"""`scripts/benchmark_linear_attention.py` on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_linear_attention import main
from click.testing import CliRunner
from tiny_models import save_tiny


def rows_of(tmp_path: Path, *arguments: str) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Rows of single layers and of mixed models."""
    model = save_tiny("llama", tmp_path / "model")
    sizes = ("--samples", "3", "--context", "64", "--max-tokens", "256", "--steps", "2", "--cache-context", "100")
    result = CliRunner().invoke(main, [str(model), "--work", str(tmp_path), *sizes, *arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "linear_attention.json").read_text())
    return rows["layers"], rows["mixes"]


def test_every_map_has_rows_of_layers_and_of_shares(tmp_path: Path) -> None:
    layers, mixes = rows_of(tmp_path, "--maps", "window,exp", "--window", "8", "--sinks", "2", "--shares", "0,0.5,1")
    assert [(row["map"], row["index"]) for row in layers] == [("window", 0), ("window", 1), ("exp", 0), ("exp", 1)]
    assert [(row["map"], len(row["layers"])) for row in mixes] == [  # type: ignore[arg-type]
        (name, count) for name in ("window", "exp") for count in (0, 1, 2)
    ]
    none, half, _ = mixes[:3]
    assert (none["ratio"], none["cache_share"]) == (1, 1)
    # The layer of the smaller divergence goes first.
    divergences = {row["index"]: row["divergence"] for row in layers[:2]}
    assert half["layers"] == [min(divergences, key=lambda index: float(str(divergences[index])))]
    # A linear layer holds 10 of 100 tokens.
    assert half["cache_share"] == pytest.approx(0.55)
