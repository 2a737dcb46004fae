"""The table of a benchmark, for people (Markdown) and for programs (JSON)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from experiments.quality.bench import Bench, S, TextBench
from experiments.quality.rows import Row, RowOf, TestScore
from shiftadd_cli.report.uncertainty import with_error
from shiftadd_cli.sizes import size


def as_json(bench: TextBench) -> str:
    """Conditions, the original, all rows and the failures."""
    conditions = bench.conditions
    document: dict[str, Any] = {
        "conditions": {
            "model": conditions.model,
            "calibration": conditions.calibration,
            "samples": conditions.samples,
            "seq_len": conditions.seq_len,
            "seed": conditions.seed,
            "tests": conditions.tests,
            "scoring": conditions.scoring,
        },
        "original": bench.original.model_dump(mode="json") if bench.original else None,
        "rows": [{**row.model_dump(mode="json"), "ratio": _ratios(bench, row)} for row in bench.ordered_rows()],
        "failed": failures(bench),
    }
    return json_text(document)


def as_markdown(bench: TextBench) -> str:
    """The original, a line per row, and below it the conditions of the numbers."""
    tests = list(bench.conditions.tests)
    header = ["method", "bits", "bits/weight", "native", "file bits/weight"]
    for name in tests:
        header += [f"{name}: perplexity", "ratio", "KL, nats/token", "same top token"]
    header += ["seconds", "peak memory"]
    lines = [line(header), line(["---"] + ["---:"] * (len(header) - 1))]
    if bench.original is not None:
        first = ["original", "-", "-", "-", f"{bench.original.file_bits_per_weight:.3f}"]
        for name in tests:
            first += [_perplexity(bench.original.scores[name]), "1.000", "-", "-"]
        lines.append(line([*first, "-", "-"]))
    for row in bench.ordered_rows():
        native = "-" if row.native_bits is None else f"{row.native_bits:.3f}"
        cells = [f"`{row.method}`", str(row.bits), f"{row.stored_bits:.3f}", native, f"{row.file_bits:.3f}"]
        ratios = _ratios(bench, row)
        for name in tests:
            score, ratio = row.scores[name], ratios[name]
            cells += [
                _perplexity(score),
                "-" if ratio is None else f"{ratio:.3f}",
                with_error(score.kl, score.kl_error, 4),
                "-" if score.agreement is None else f"{score.agreement:.2%}",
            ]
        lines.append(line([*cells, f"{row.seconds:.1f}", size(row.peak_memory_bytes)]))
    return "\n".join([*lines, "", *_notes(bench)]) + "\n"


def _notes(bench: TextBench) -> list[str]:
    conditions, rows = bench.conditions, bench.ordered_rows()
    peers = any(row.settings["artifact"]["peer"] for row in rows)
    notes = [f"Model: {conditions.model} (fingerprint {conditions.model_fingerprint[:16]})."]
    if bench.original is not None:
        notes[0] = notes[0][:-1] + f", {bench.original.parameters:,} parameters."
        notes += [
            f"Test {name}: {score.tokens:,} tokens in {score.windows:,} windows of {conditions.window} (context) that "
            f"do not overlap, {score.scored_tokens:,} scored; computed in {score.dtype} on {score.device}."
            for name, score in bench.original.scores.items()
        ]
    for text in dict.fromkeys(row.calibration for row in rows):
        users = listed(row.method for row in rows if row.calibration == text)
        notes.append(f"Calibration {text or 'none (weights only)'}: {users}.")
    notes += [
        f"Calibration windows, unless a method says otherwise: {conditions.samples} x {conditions.seq_len} tokens, "
        f"seed {conditions.seed}.",
        "± is one standard error, with windows as independent draws. ratio: perplexity over that of the original. KL: "
        "KL(original || method).",
        "bits/weight: all bits stored for the quantized layers over their weights. native: the same for a uniform "
        "grid in a format of its own, which needs a float16 scale and an integer zero point per group, bits + (16 + "
        "bits) / group; our container stores a float16 scale per plane and an offset. Other grids have no such format.",
        "seconds and peak memory: of the quantizing process, from its report; other jobs may have been running.",
        *(["Peers are scored by their decoded weights; bits/weight is the size they would store."] if peers else []),
        *origins(bench, lambda row: row.method),
    ]
    return [f"- {note}" for note in notes]


def _ratios(bench: TextBench, row: Row) -> dict[str, float | None]:
    """Perplexity over that of the original, by test, from log-likelihoods, which stay finite."""
    ratios: dict[str, float | None] = {}
    for name, score in row.scores.items():
        reference = bench.original.scores[name].nll if bench.original else math.inf
        # None where exp would overflow.
        ratios[name] = None if score.perplexity is None or math.isinf(reference) else math.exp(score.nll - reference)
    return ratios


def _perplexity(score: TestScore) -> str:
    return "infinite" if score.perplexity is None else with_error(score.perplexity, score.perplexity_error, 3)


def failures(bench: Bench[S]) -> list[dict[str, Any]]:
    """Rows that could not be made, for JSON."""
    return [
        {"method": bench.cells[index].method.label, "bits": bench.cells[index].bits, "error": error}
        for index, error in sorted(bench.failed.items())
    ]


def json_text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def origins(bench: Bench[S], name: Callable[[RowOf[S]], str]) -> list[str]:
    """Versions, machines and sources of the rows, and errors of failed ones. name: of a row in the list of sources."""
    rows = bench.ordered_rows()
    return [
        f"Versions: {listed(told(row.settings['artifact']['versions']) for row in rows)}.",
        f"Machine: {listed(told(row.machine) for row in rows)}.",
        *(
            f"Sources {code[:16]}: {listed(name(row) for row in rows if row.code == code)}."
            for code in dict.fromkeys(row.code for row in rows)
        ),
        *(
            f"Failed: `{failure['method']}` at {failure['bits']} bits: {failure['error']}"
            for failure in failures(bench)
        ),
    ]


def told(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def listed(texts: Iterable[str]) -> str:
    """The texts without duplicates."""
    return "; ".join(dict.fromkeys(texts))


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
