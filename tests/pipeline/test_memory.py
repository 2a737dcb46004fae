"""Memory of a run: the planned peak against a measured one, and a peak per process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from stopped_runs import counting_text
from tiny_models import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


def test_peak_memory_excludes_the_parent_process() -> None:
    child = "from shiftadd_cli.pipeline.memory import resident_bytes; print(resident_bytes())"
    parent = (
        "import subprocess, sys; ballast = bytearray(b'x') * (1 << 30); "
        "subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    )
    process = subprocess.run([sys.executable, "-c", parent, child], capture_output=True, text=True, check=True)
    assert 10e6 < int(process.stdout) < 1e9


def test_planned_peak_is_within_a_fifth_of_the_measured_one(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=8000,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    counting_text(tmp_path / "text.txt")
    # In a separate process, so that no other test has raised its peak.
    child = (
        "from pathlib import Path\n"
        "from shiftadd_cli.pipeline.job import Job\n"
        "from shiftadd_cli.pipeline.memory import resident_bytes\n"
        "from shiftadd_cli.recipe import Recipe\n"
        "fields = {'calibration': 'text.txt', 'samples': 16, 'seq_len': 128, 'fit': 'greedy', 'refine_rounds': 0}\n"
        "job = Job.prepare('model', Path('out'), Recipe.load('equal-bits', fields))\n"
        "job.run()\n"
        "print(job.plan.peak_memory_bytes, resident_bytes())\n"
    )
    process = subprocess.run([sys.executable, "-c", child], cwd=tmp_path, capture_output=True, text=True, check=True)
    planned, measured = map(int, process.stdout.split())
    assert measured / 1.2 <= planned <= 1.2 * measured
