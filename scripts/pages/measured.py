"""Tables of measured rows, only from scripts/measured/*/table.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.quality.later import LATER

from pages.text import table
from shiftadd_cli.cli.options import option_name
from shiftadd_cli.recipe import BITS, Recipe
from shiftadd_cli.report.uncertainty import with_error

MEASURED = Path(__file__).resolve().parent.parent / "measured"

# Scores of images: field, title, factor, digits.
_IMAGES = (("top1", "top-1, %", 100, 1), ("agreement", "same top class, %", 100, 1), ("kl", "KL, nats/image", 1, 4))

# Rows of the README: method and bits as measured, and a remark.
_QUALITY = (
    ("best:avg_bits=3.25", 3, ""),
    ("default:avg_bits=3.4", 3, ""),
    ("default:avg_bits=3.25", 3, ""),
    ("peer:autoround-light", 3, ""),
    ("peer:gptqmodel:group_size=64", 3, ""),
    ("rtn", 3, "round to nearest"),
    ("best:avg_bits=2.25", 2, ""),
    ("default:target_size=45MB", 2, ""),
    ("default:avg_bits=2.25", 2, ""),
    ("peer:autoround-light", 2, ""),
    ("gptq", 2, ""),
)

_MODELS = {"demo": "SmolLM2-135M-Instruct (`demo`)"}

_BUDGETS = [field for field in BITS if field not in ("bits", "bit_plan")]

# Fields that are conditions of a table, or do not affect the stored model.
_CONDITIONS = {"calibration", "samples", "seq_len", "batch_size", "seed", "device", "dtype", "shard_size", "bit_plan"}


def measured_names() -> list[str]:
    """Names of the folders of rows that have a table."""
    return sorted(path.parent.name for path in MEASURED.glob("*/table.json"))


def measured_table(name: str, *methods: str) -> str:
    """All rows of a folder, or of these methods, sorted by bits and then by divergence, and their conditions."""
    document = load(name)
    text = "tests" in document["conditions"]
    chosen = [row for row in document["rows"] if not methods or row["method"] in methods]
    rows = sorted(chosen, key=lambda row: (row["bits"], _divergence(row)))
    return (_text_table(document, rows) if text else _image_table(document, rows)) + "\n" + _conditions(document)


def quality_table() -> str:
    """The table of the README."""
    document = load("smollm2-brown-train")
    original = document["original"]["scores"]
    lines = [["original", "-", "16", _short(original["wikitext2-test"]), "1", "-", _short(original["brown-test"]), "1"]]
    rows = {(row["method"], row["bits"]): row for row in document["rows"]}
    for method, bits, remark in _QUALITY:
        row = rows[method, bits]
        first, second = row["scores"]["wikitext2-test"], row["scores"]["brown-test"]
        native = row["native_bits"]
        own = "" if native in (None, row["stored_bits"]) else f"{native:.3f} in a format of its own"
        remarks = "; ".join(filter(None, (remark, own)))
        lines.append(
            [
                command_of(row) + (f" ({remarks})" if remarks else ""),
                f"{row['stored_bits']:.3f}",
                f"{row['file_bits']:.3f}",
                _short(first),
                _ratio(row["ratio"]["wikitext2-test"]),
                with_error(first["kl"], first["kl_error"], 3),
                _short(second),
                _ratio(row["ratio"]["brown-test"]),
            ]
        )
    header = ("recipe", "layers", "file", "WikiText-2 test", "ratio", "KL, nats/token", "Brown test", "ratio")
    return table(header, lines, numbers=7)


def size_table(name: str, *methods: str) -> str:
    """These rows of a folder, from the largest file to the smallest, by the loss on the first text."""
    document = load(name)
    test, parameters = next(iter(document["original"]["scores"])), document["original"]["parameters"]
    rows = {row["method"]: row for row in document["rows"]}
    lines = []
    for row in sorted((rows[method] for method in methods), key=lambda row: -float(row["file_bits"])):
        score = row["scores"][test]
        lines.append(
            [
                command_of(row),
                f"{row['file_bits'] * parameters / 8e6:.1f}",
                f"{row['file_bits']:.3f}",
                f"{row['stored_bits']:.3f}",
                _ratio(row["ratio"][test]),
                with_error(score["kl"], score["kl_error"], 3),
            ]
        )
    header = ("recipe", "MB", "bits/weight, file", "bits/weight, layers", "ratio", "KL, nats/token")
    return table(header, lines, numbers=5) + "\n" + _conditions(document)


def calibration_table(name: str) -> str:
    """The loss of the recipe `default` at each size, by calibration text, best first."""
    document = load(name)
    tests = list(document["original"]["scores"])
    lines = []
    for row in sorted(document["rows"], key=lambda row: (-row["bits"], _divergence(row))):
        calibration = row["method"].rpartition("calibration=")[2].strip('"')
        cells = [f"{row['stored_bits']:.3f}", f"`{calibration}`"]
        for test in tests:
            score = row["scores"][test]
            cells.append(f"{with_error(score['kl'], score['kl_error'], 3)} ({_ratio(row['ratio'][test])})")
        lines.append(cells)
    header = ("bits/weight", "calibration", *(f"{test}: KL (ratio)" for test in tests))
    return table(header, lines, numbers=len(tests)) + "\n" + _conditions(document)


def load(name: str) -> dict[str, Any]:
    """The table of a folder of rows."""
    document: dict[str, Any] = json.loads((MEASURED / name / "table.json").read_text(encoding="utf-8"))
    return document


def _text_table(document: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    tests = list(document["original"]["scores"])
    header = ["recipe", "layers", "file"]
    first = ["original", "-", f"{document['original']['file_bits_per_weight']:.3f}"]
    for test in tests:
        header += [f"{test}: perplexity", "ratio", "KL, nats/token"]
        first += [_short(document["original"]["scores"][test]), "1", "-"]
    lines = [first]
    for row in rows:
        cells = _name_and_bits(row)
        for test in tests:
            score = row["scores"][test]
            cells += [_short(score), _ratio(row["ratio"][test])]
            cells += [with_error(score["kl"], score["kl_error"], 3)]
        lines.append(cells)
    return table(header, lines, numbers=len(header) - 1)


def _image_table(document: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    test = document["conditions"]["test"]
    first = ["original", "-", f"{document['original']['file_bits_per_weight']:.3f}"]
    lines = [first + _image_scores(document["original"]["scores"][test])]
    lines += [_name_and_bits(row) + _image_scores(row["scores"][test]) for row in rows]
    header = ["recipe", "layers", "file", *(title for _, title, _, _ in _IMAGES)]
    return table(header, lines, numbers=len(header) - 1)


def _image_scores(score: dict[str, Any]) -> list[str]:
    cells = []
    for name, _, factor, digits in _IMAGES:
        value, error = score[name], score[f"{name}_error"]
        cells.append("-" if value is None else with_error(factor * value, factor * error, digits))
    return cells


def _name_and_bits(row: dict[str, Any]) -> list[str]:
    return [command_of(row), f"{row['stored_bits']:.3f}", f"{row['file_bits']:.3f}"]


def command_of(row: dict[str, Any]) -> str:
    """The command that gives this row today: the recipe, its bits, and every option that has changed since.

    Defaults change while rows stay, so a row's own name does not suffice.
    """
    name, _, option = row["method"].partition(":")
    if name == "peer":
        return f"{option.replace(':', ', ')}, {row['bits']} bits (a peer)"
    then, now = LATER | row["settings"]["artifact"]["recipe"], Recipe.load(name).model_dump(mode="json")
    budget = next((field for field in _BUDGETS if then.get(field) is not None), None)
    words = [name, f"--bits {row['bits']}" if budget is None else _option(budget, then[budget])]
    for field in now.keys() - _CONDITIONS - {"bits", *_BUDGETS}:
        if field in then and then[field] != now[field]:
            words.append(_option(field, then[field]))
    return f"`{' '.join(words[:2] + sorted(words[2:]))}`"


def _option(field: str, value: Any) -> str:
    flag = option_name(field)
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    if field in _BUDGETS and isinstance(value, float):
        value = f"{value:g}"
    return f"{flag} {','.join(map(str, value)) if isinstance(value, list) else value}"


def _divergence(row: dict[str, Any]) -> float:
    score = next(iter(row["scores"].values()))
    return float("inf") if score["kl"] is None else float(score["kl"])


def _short(score: dict[str, Any]) -> str:
    value, error = score["perplexity"], score["perplexity_error"]
    if value is None:
        return "infinite"
    return with_error(value, error, 2) if value < 1000 else with_error(value, error, 0)


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _conditions(document: dict[str, Any]) -> str:
    conditions = document["conditions"]
    model = _MODELS.get(conditions["model"], Path(conditions["model"]).name)
    original, scores = document["original"], next(iter(document["original"]["scores"].values()))
    where = f"computed in {scores['dtype']} on {scores['device']} ({original['machine']['processor']})"
    if "tests" in conditions:
        own = any("calibration=" in row["method"] for row in document["rows"])
        named = "the text named" if own else Path(conditions["calibration"]).name
        amount = f"{conditions['samples']} x {conditions['seq_len']} tokens of {named}"
        tests = ", ".join(f"{score['tokens']:,} tokens of {name}" for name, score in original["scores"].items())
        measured = f"measured on {tests} in windows of {conditions['scoring']['context']}"
    else:
        amount = f"{conditions['samples']} images of {Path(conditions['calibration']).name}"
        measured = f"measured on {scores['images']:,} images of {conditions['test']}"
    failed = "".join(
        f" Could not be made: `{row['method']}` at {row['bits']} bits ({row['error'].rstrip('.')})."
        for row in document["failed"]
    )
    return f"{model}, {original['parameters']:,} parameters; calibrated on {amount}, {measured}, {where}.{failed}\n"
