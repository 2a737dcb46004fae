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
    """Conditions and everything that was measured so far."""
    conditions = bench.conditions[0]
    original = bench.bench.original
    document: dict[str, Any] = {
        "conditions": {
            "model": conditions.model,
            "recipe": bench.method.label,
            "calibration": conditions.calibration,
            "samples": conditions.samples,
            "seq_len": conditions.seq_len,
            "seeds": [each.seed for each in bench.conditions],
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
                "seed": each.seed,
                "kendall_tau": {
                    kind: _tau([predicted[kind] for predicted, _ in mixes], [kl for _, kl in mixes])
                    for kind in mixes[0][0]
                },
            }
            for each in bench.conditions
            if (mixes := mix_losses(bench, each.seed))
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
    """Kendall's tau of predicted loss against the KL of layers replaced alone, by sensitivity of the first seed; None
    where undefined, and nothing where no layer was replaced."""
    row = bench.alone
    if row is None:
        return {}
    return {
        kind: _tau([found.costs[name][row.bits] for name in row.kl], list(row.kl.values()))
        for (kind, seed), found in bench.sensitivities.items()
        if seed == bench.conditions[0].seed
    }


def mix_losses(bench: Allocations, seed: int) -> list[tuple[dict[str, float], float]]:
    """Predicted total by sensitivity, and KL on the first test, of every different mix of a seed that was measured."""
    test = next(iter(bench.conditions[0].tests))
    found = {}
    for mix in bench.mixes:
        row = bench.row(mix)
        kl = None if row is None else row.scores[test].kl
        if mix.seed == seed and kl is not None:
            found[tuple(mix.plan.bits.items())] = (mix.predicted, kl)
    return list(found.values())


def _tau(predicted: Sequence[float], real: Sequence[float]) -> float | None:
    from scipy.stats import kendalltau

    if len(predicted) < 2:
        return None
    tau = float(kendalltau(predicted, real).statistic)
    return tau if math.isfinite(tau) else None


def as_markdown(bench: Allocations) -> str:
    """Mixes, rank correlations, what sensitivities take, sizes, the solver, and what the numbers depend on."""
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
            ["asked, bytes", "on disk, bytes", "share of it"],
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
        # What has no unit is no prediction of a loss; others are predicted by the first sensitivity.
        kind = planner if planner in SENSITIVITIES else SENSITIVITIES[0]
        told = _spread((mix.predicted[kind] for mix in mixes), 4) if UNITS.get(kind) == "nats/token" else "-"
        cells = [f"{budget:g}", f"`{planner}`", _spread((mix.plan.bits_per_weight for mix in mixes), 3), told]
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
        seeds = [seed for each, seed in bench.sensitivities if each == kind]
        single = [alone[kind]] if kind in alone else []
        whole = [mix_losses(bench, seed) for seed in seeds]
        taus = [_tau([predicted[kind] for predicted, _ in mixes], [kl for _, kl in mixes]) for mixes in whole]
        ratios = [kl / predicted[kind] for mixes in whole for predicted, kl in mixes if predicted[kind] > 0]
        said = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios and UNITS.get(kind) == "nats/token" else "-"
        lines.append([f"`{kind}`", _spread(single, 3), _spread(taus, 3), said])
    return _table(["sensitivity", "tau, single layers", "tau, mixes", "KL / predicted total, mixes"], lines)


def _sensitivities(bench: Allocations) -> list[str]:
    lines = []
    for kind in SENSITIVITIES:
        rows = [row for (each, _), row in bench.sensitivities.items() if each == kind]
        seconds = _spread((row.seconds for row in rows), 1)
        lines.append([f"`{kind}`", seconds, size(max(row.peak_memory_bytes for row in rows))])
    return _table(["sensitivity", "seconds", "peak memory"], lines)


def _notes(bench: Allocations) -> list[str]:
    conditions = bench.conditions[0]
    notes = [
        f"Model: {conditions.model} (fingerprint {conditions.model_fingerprint[:16]}), recipe {bench.method.label}, "
        f"candidates {', '.join(map(str, bench.candidates))}; layers that read one input are tied.",
        f"Calibration {conditions.calibration}: {conditions.samples} x {conditions.seq_len} tokens, seeds "
        f"{', '.join(str(each.seed) for each in bench.conditions)} (of everything random, windows included).",
        "± is the standard deviation over seeds.",
        *[f"`{kind}` was measured for the first seed alone." for kind in bench.once],
        "uniform: equal bits, the fewest candidate that takes the budget or more, so it is the larger file. random: "
        "drawn until the budget is full. Predicted loss: nats/token by the sensitivity that chose, by "
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
            f"alone at {row.bits} bits in the original (as fitted in a run with these bits for all, of the first seed)."
        )
    if bench.solver is not None:
        solver = bench.solver
        notes.append(
            f"Solver: {solver.linears} linears of {solver.blocks} blocks x {solver.candidates} candidates, random "
            f"sensitivities, nothing tied: {', '.join(f'{seconds:.2f}' for seconds in solver.seconds)} s at budgets "
            "over the range."
        )
    machines = {", ".join(f"{key} {value}" for key, value in row.machine.items()): None
                for row in bench.sensitivities.values()}  # fmt: skip
    notes += [f"Machine: {each}; it may have had other work." for each in machines]
    notes += [f"Failed: {bench.bench.cells[index].method.label}: {error}"
              for index, error in sorted(bench.bench.failed.items())]  # fmt: skip
    return notes


def _spread(values: Iterable[float | None], digits: int) -> str:
    """Mean and standard deviation; the mean alone of one value, a dash where one is not known."""
    found = list(values)
    known = [value for value in found if value is not None]
    if not known or len(known) < len(found):
        return "-"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
