"""The tables of the benchmark, for people (Markdown) and for programs (JSON)."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.mixes.bench import SENSITIVITIES, Allocations
from experiments.mixes.planning import Mix
from shiftadd_cli.cli.describe_bits import UNITS
from shiftadd_cli.sizes import size


def as_json(bench: Allocations) -> str:
    """Conditions and all measurements so far."""
    conditions = bench.conditions[0]
    original = bench.bench.original
    document: dict[str, Any] = {
        "conditions": {
            "model": conditions.model,
            "recipe": bench.method.label,
            "calibration": conditions.calibration,
            "samples": conditions.samples,
            "seq_len": conditions.seq_len,
            "seeds": [seeded.seed for seeded in bench.conditions],
            "candidates": bench.candidates,
            "tests": conditions.tests,
            "scoring": conditions.scoring,
        },
        "original": original.model_dump(mode="json") if original else None,
        "mixes": [
            {
                "budget": mix.budget,
                "planner": mix.planner,
                "seed": mix.seed,
                "bits": mix.plan.bits,
                "bits_per_weight": mix.plan.bits_per_weight,
                "planes_per_weight": mix.plan.planes_per_weight,
                "predicted": mix.predicted,
                "row": row.model_dump(mode="json") if (row := bench.row(mix)) else None,
            }
            for mix in bench.mixes
        ],
        "failed": [
            {"method": bench.bench.cells[index].method.label, "error": error}
            for index, error in sorted(bench.bench.failed.items())
        ],
        "mix_tau": [
            {
                "seed": seeded.seed,
                "kendall_tau": {
                    kind: _tau([predicted[kind] for predicted, _ in mixes], [kl for _, kl in mixes])
                    for kind in mixes[0][0]
                },
            }
            for seeded in bench.conditions
            if (mixes := mix_losses(bench, seeded.seed))
        ],
        "sensitivities": [
            {
                "sensitivity": kind,
                "seed": seed,
                **row.model_dump(mode="json", exclude={"costs", "shared_inputs", "scores"}),
            }
            for (kind, seed), row in bench.sensitivities.items()
        ],
        "alone": {
            "seed": conditions.seed,
            "kendall_tau": rank_correlations(bench),
            **bench.alone.model_dump(mode="json"),
        }
        if bench.alone
        else None,
        "sizes": [row.model_dump(mode="json") for row in bench.sizes],
        "solver": bench.solver.model_dump(mode="json") if bench.solver else None,
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def rank_correlations(bench: Allocations) -> dict[str, float | None]:
    """Kendall's tau of predicted loss against the KL of layers replaced alone, by sensitivity of the first seed. None
    if undefined; empty if no layer was replaced."""
    row = bench.alone
    if row is None:
        return {}
    return {
        kind: _tau([sensitivity.costs[name][row.bits] for name in row.kl], list(row.kl.values()))
        for (kind, seed), sensitivity in bench.sensitivities.items()
        if seed == bench.conditions[0].seed
    }


def mix_losses(bench: Allocations, seed: int) -> list[tuple[dict[str, float], float]]:
    """Predicted total by sensitivity, and KL on the first test, of every distinct measured mix of a seed."""
    test = next(iter(bench.conditions[0].tests))
    losses = {}
    for mix in bench.mixes:
        row = bench.row(mix)
        kl = None if row is None else row.scores[test].kl
        if mix.seed == seed and kl is not None:
            losses[tuple(mix.plan.bits.items())] = (mix.predicted, kl)
    return list(losses.values())


def _tau(predicted: Sequence[float], real: Sequence[float]) -> float | None:
    from scipy.stats import kendalltau

    if len(predicted) < 2:
        return None
    tau = float(kendalltau(predicted, real).statistic)
    return tau if math.isfinite(tau) else None


def as_markdown(bench: Allocations) -> str:
    """Mixes, rank correlations, costs of sensitivities, sizes, the solver, and the conditions of the numbers."""
    parts = [
        "## Mixes at equal budgets",
        "",
        *_mixes(bench),
        "",
        "## Predicted against real loss",
        "",
        *_prediction(bench),
        "",
        "## Sensitivities",
        "",
        *_sensitivities(bench),
        "",
        "## Sizes of files",
        "",
        *_table(
            ["requested, bytes", "on disk, bytes", "share"],
            [[f"{row.target_bytes:,}", f"{row.file_bytes:,}", f"{row.file_bytes / row.target_bytes:.3%}"]
             for row in bench.sizes],
        ),
        "",
        *[f"- {note}" for note in _notes(bench)],
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _mixes(bench: Allocations) -> list[str]:
    tests = list(bench.conditions[0].tests)
    header = ["budget", "bits chosen by", "bits/weight", "predicted loss"]
    for name in tests:
        header += [f"{name}: KL, nats/token", "perplexity", "same top token"]
    groups: dict[tuple[float, str], list[Mix]] = {}
    for mix in bench.mixes:
        groups.setdefault((mix.budget, mix.planner), []).append(mix)
    lines = []
    for (budget, planner), mixes in sorted(groups.items(), key=lambda item: item[0][0]):
        # A sensitivity without a unit predicts no loss; the first one predicts that of random and uniform mixes.
        kind = planner if planner in SENSITIVITIES else SENSITIVITIES[0]
        predicted = _spread((mix.predicted[kind] for mix in mixes), 4) if UNITS.get(kind) == "nats/token" else "-"
        cells = [f"{budget:g}", f"`{planner}`", _spread((mix.plan.bits_per_weight for mix in mixes), 3), predicted]
        rows = [row for mix in mixes if (row := bench.row(mix)) is not None]
        for name in tests:
            scores = [row.scores[name] for row in rows]
            cells += [
                _spread((score.kl for score in scores), 4),
                _spread((score.perplexity for score in scores), 3),
                _spread((None if score.agreement is None else 100 * score.agreement for score in scores), 2) + "%",
            ]
        lines.append(cells)
    return _table(header, lines)


def _prediction(bench: Allocations) -> list[str]:
    lines, alone = [], rank_correlations(bench)
    for kind in SENSITIVITIES:
        seeds = [seed for name, seed in bench.sensitivities if name == kind]
        single = [alone[kind]] if kind in alone else []
        by_seed = [mix_losses(bench, seed) for seed in seeds]
        taus = [_tau([predicted[kind] for predicted, _ in mixes], [kl for _, kl in mixes]) for mixes in by_seed]
        ratios = [kl / predicted[kind] for mixes in by_seed for predicted, kl in mixes if predicted[kind] > 0]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios and UNITS.get(kind) == "nats/token" else "-"
        lines.append([f"`{kind}`", _spread(single, 3), _spread(taus, 3), spread])
    return _table(["sensitivity", "tau, single layers", "tau, mixes", "KL / predicted total, mixes"], lines)


def _sensitivities(bench: Allocations) -> list[str]:
    lines = []
    for kind in SENSITIVITIES:
        rows = [row for (name, _), row in bench.sensitivities.items() if name == kind]
        seconds = _spread((row.seconds for row in rows), 1)
        lines.append([f"`{kind}`", seconds, size(max(row.peak_memory_bytes for row in rows))])
    return _table(["sensitivity", "seconds", "peak memory"], lines)


def _notes(bench: Allocations) -> list[str]:
    conditions = bench.conditions[0]
    notes = [
        f"Model: {conditions.model} (fingerprint {conditions.model_fingerprint[:16]}), recipe {bench.method.label}, "
        f"candidates {', '.join(map(str, bench.candidates))}; layers with the same input are tied.",
        f"Calibration {conditions.calibration}: {conditions.samples} x {conditions.seq_len} tokens, seeds "
        f"{', '.join(str(seeded.seed) for seeded in bench.conditions)} (for everything random, including windows).",
        "± is the standard deviation over seeds.",
        *[f"`{kind}` was measured for the first seed alone." for kind in bench.once],
        "uniform: equal bits, the smallest candidate that takes at least the budget, so it is the larger file. random: "
        "drawn until the budget is full. Predicted loss: nats/token by the sensitivity that chose the bits, or by "
        f"'{SENSITIVITIES[0]}' for random and uniform.",
    ]
    if bench.bench.original is not None:
        notes += [
            f"Test {name}: {score.scored_tokens:,} tokens scored in windows of {conditions.window}; perplexity of the "
            f"original {score.perplexity or math.inf:.3f}, computed in {score.dtype} on {score.device}."
            for name, score in bench.bench.original.scores.items()
        ]
    notes.append(
        f"tau: Kendall's rank correlation of predicted loss and KL on {next(iter(conditions.tests))}, within each seed."
    )
    if bench.alone is not None:
        row = bench.alone
        notes.append(
            f"Single layers: {len(row.kl)} linears, all of {bench.sample_blocks} blocks spread evenly over depth, each "
            f"alone at {row.bits} bits in the original (as fitted in a run of the first seed with these bits for all)."
        )
    if bench.solver is not None:
        solver = bench.solver
        notes.append(
            f"Solver: {solver.linears} linears of {solver.blocks} blocks x {solver.candidates} candidates, random "
            f"sensitivities, no tied layers: {', '.join(f'{seconds:.2f}' for seconds in solver.seconds)} s at budgets "
            "over the range."
        )
    machines = {", ".join(f"{key} {value}" for key, value in row.machine.items()): None
                for row in bench.sensitivities.values()}  # fmt: skip
    notes += [f"Machine: {name}; other jobs may have been running." for name in machines]
    notes += [f"Failed: {bench.bench.cells[index].method.label}: {error}"
              for index, error in sorted(bench.bench.failed.items())]  # fmt: skip
    return notes


def _spread(values: Iterable[float | None], digits: int) -> str:
    """Mean and standard deviation; only the mean for a single value, a dash if a value is missing."""
    everything = list(values)
    present = [value for value in everything if value is not None]
    if not present or len(present) < len(everything):
        return "-"
    mean = f"{statistics.fmean(present):.{digits}f}"
    return mean if len(present) == 1 else f"{mean} ± {statistics.stdev(present):.{digits}f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
