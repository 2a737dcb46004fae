"""The table of vision models, for people (Markdown) and for programs (JSON)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.quality.table import failures, json_text, line, listed, origins
from experiments.vision.bench import ImageBench
from experiments.vision.rows import ImageRow, ImageTestScore
from shiftadd_cli.report.uncertainty import with_error
from shiftadd_cli.sizes import size

_SCORES = (
    ("top1", "top-1", 100, 2),
    ("top5", "top-5", 100, 2),
    ("neighbours", "nearest neighbours", 100, 2),
    ("agreement", "same top class", 100, 2),
    ("kl", "KL, nats/image", 1, 4),
    ("cosine", "cosine", 1, 4),
)


def as_json(bench: ImageBench) -> str:
    """Conditions, the original, all rows and the failures."""
    conditions = bench.conditions
    document: dict[str, Any] = {
        "conditions": {
            "model": Path(conditions.model).name,
            "calibration": Path(conditions.calibration).name,
            "samples": conditions.samples,
            "seed": conditions.seed,
            "test": conditions.test_name,
            "scoring": conditions.scoring,
        },
        "original": bench.original.model_dump(mode="json") if bench.original else None,
        "rows": [row.model_dump(mode="json") for row in bench.ordered_rows()],
        "failed": failures(bench),
    }
    return json_text(document)


def as_markdown(bench: ImageBench) -> str:
    """The original, a line per row, and below it the conditions of the numbers."""
    name, rows = bench.conditions.test_name, bench.ordered_rows()
    originals = [bench.original.scores[name]] if bench.original else []
    scores = [*originals, *(row.scores[name] for row in rows)]
    shown = [entry for entry in _SCORES if any(getattr(score, entry[0]) is not None for score in scores)]
    header = ["method", "bits", "bits/weight", "file bits/weight", *(title for _, title, _, _ in shown)]
    header += ["seconds", "peak memory"]
    lines = [line(header), line(["---"] + ["---:"] * (len(header) - 1))]
    if bench.original is not None:
        first = ["original", "-", "-", f"{bench.original.file_bits_per_weight:.3f}"]
        lines.append(line([*first, *_cells(originals[0], shown), "-", "-"]))
    for row in rows:
        cells = [f"`{row.method}`", str(row.bits), f"{row.stored_bits:.3f}", f"{row.file_bits:.3f}"]
        cells += _cells(row.scores[name], shown)
        lines.append(line([*cells, f"{row.seconds:.1f}", size(row.peak_memory_bytes)]))
    return "\n".join([*lines, "", *_notes(bench, rows)]) + "\n"


def _cells(score: ImageTestScore, shown: list[tuple[str, str, int, int]]) -> list[str]:
    cells = []
    for name, _, factor, digits in shown:
        value, error = getattr(score, name), getattr(score, f"{name}_error")
        unit = "%" if factor == 100 and value is not None else ""
        times = [None if number is None else factor * number for number in (value, error)]
        cells.append(with_error(times[0], times[1], digits) + unit)
    return cells


def _notes(bench: ImageBench, rows: list[ImageRow]) -> list[str]:
    conditions = bench.conditions
    notes = [
        f"Model: {Path(conditions.model).name} (fingerprint {conditions.model_fingerprint[:16]})"
        + (f", {bench.original.parameters:,} parameters." if bench.original else ".")
    ]
    if bench.original is not None:
        notes += [
            f"Test {name}: {score.images:,} images; computed in {score.dtype} on {score.device}."
            for name, score in bench.original.scores.items()
        ]
    for images in dict.fromkeys(row.calibration for row in rows):
        users = listed(row.method for row in rows if row.calibration == images)
        amount = f", {conditions.samples} of them, seed {conditions.seed}" if images else ""
        notes.append(f"Calibration {images or 'none (weights only)'}{amount}: {users}.")
    notes += [
        "± is one standard error, with images as independent draws. KL: KL(original || method) of the class scores.",
        "bits/weight: all bits stored for the quantized layers over their weights.",
        "seconds and peak memory: of the quantizing process, from its report; other jobs may have been running.",
        *origins(bench, lambda row: f"{row.method} ({row.bits} bits)"),
    ]
    return [f"- {note}" for note in notes]
