"""`scripts/benchmark_contexts.py` on a tiny random model."""

from __future__ import annotations

from pathlib import Path

from benchmark_contexts import main
from click.testing import CliRunner
from tiny_models import save_tiny

from shiftadd_cli.pipeline.linearize import LinearizeJob
from shiftadd_cli.pipeline.linearize_settings import LinearizeSettings


def test_the_cache_of_a_linear_model_stops_growing(tmp_path: Path) -> None:
    model, linear = save_tiny("llama", tmp_path / "model"), tmp_path / "linear"
    settings = LinearizeSettings(window=8, samples=2, seq_len=64, steps=0, layers="all")
    LinearizeJob.prepare(str(model), linear, settings).run()
    result = CliRunner().invoke(main, [str(model), str(linear), "--contexts", "256,448", "--new-tokens", "3"])
    assert result.exit_code == 0, result.output
    caches = {(row[0], row[1]): row[2] for line in result.output.splitlines()[1:] if len(row := line.split()) > 3}
    # Two heads of 12 numbers, keys and values, in float32, for two layers.
    assert caches["256", str(model)] == f"{259 * 2 * 2 * 12 * 4 * 2 / 1000:.1f}"
    assert caches["256", str(linear)] == caches["448", str(linear)]
