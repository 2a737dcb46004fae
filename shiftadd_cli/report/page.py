"""report.html: a self-contained page about one run, or about several side by side."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from pydantic import ValidationError

from shiftadd_cli.artifact.contents import alike
from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.bcq.choices import Choice, bits_of_choice, choice_words, choices_in_words
from shiftadd_cli.errors import ArtifactError, first_fault
from shiftadd_cli.recipe import Recipe, nearest_recipe
from shiftadd_cli.report.charts import Chart, Line, histogram, line_chart
from shiftadd_cli.report.cost import Cost, model_cost
from shiftadd_cli.report.environment import make_environment
from shiftadd_cli.report.evaluation_file import EvaluationReport, ImageEvaluationReport, Quality, load_evaluations
from shiftadd_cli.report.operations import WAYS
from shiftadd_cli.report.schema import LayerReport, Report
from shiftadd_cli.report.unit_costs import load_unit_costs
from shiftadd_cli.runtime.skeleton import artifact_skeleton

PAGE_FILE = "report.html"
_WORST = 10
# Unit of the predicted loss, by sensitivity.
_LOSS_UNITS = {"output": "nats a token", "divergence": "nats a token"}


@dataclass(frozen=True)
class Run:
    """The contents of a page about one checkpoint; `name` is the name of its folder."""

    name: str
    report: Report
    cost: Cost
    evaluations: tuple[EvaluationReport | ImageEvaluationReport, ...] = ()

    @property
    def quality(self) -> Quality | None:
        """The measurement shown first: preferably one against an original."""
        compared = [evaluation for evaluation in self.evaluations if evaluation.original is not None]
        shown = next(iter(compared or self.evaluations), None)
        return None if shown is None else shown.quality

    @property
    def command(self) -> str:
        """The command, or the Python call, that reproduces the checkpoint."""
        report = self.report
        if report.command:
            return shlex.join(["shiftadd", *report.command])
        recipe, fields = nearest_recipe(report.recipe)
        named = "" if recipe == "default" else f", {recipe!r}"
        given = "".join(f", {name}={value!r}" for name, value in fields.items())
        return f"shiftadd_cli.quantize({report.source.spec!r}, {self.name!r}{named}{given})"

    @property
    def loading(self) -> str:
        """Python that loads the checkpoint."""
        source = self.report.source
        model, reader = "AutoModelForCausalLM", "AutoTokenizer"
        if source.reads_images:
            model, reader = source.architecture, "AutoImageProcessor"
        return (
            "import shiftadd_cli\n"
            f"from transformers import {', '.join(sorted((model, reader)))}\n\n"
            f"model = {model}.from_pretrained({self.name!r})\n"
            f"{'image_processor' if source.reads_images else 'tokenizer'} = {reader}.from_pretrained({self.name!r})"
        )


def open_run(folder: Path, *, trust_remote_code: bool = False) -> Run:
    """The run that wrote the checkpoint in `folder`, read from its files.

    trust_remote_code: run model code that ships with it.

    Raises ArtifactError if the folder is not a shiftadd checkpoint, or has no readable report.json.
    """
    artifact = Artifact.open(folder)
    if artifact.report is None:
        raise ArtifactError(f"{folder} has no report.json to make a page from; only `shiftadd quantize` writes one.")
    values = {name: value for name, value in artifact.report.items() if name != "files"}
    try:
        report = Report.model_validate(values)
    except ValidationError as failure:
        path, message = first_fault(failure)
        raise ArtifactError(
            f"{folder / 'report.json'} does not match the schema of this shiftadd version ({'.'.join(path)}: "
            f"{message}); quantize the model again."
        ) from None
    skeleton = artifact_skeleton(folder, trust_remote_code=trust_remote_code)
    cost = model_cost(skeleton, artifact.format, artifact.tensors, load_unit_costs())
    return Run(folder.resolve().name, report, cost, load_evaluations(folder))


def render_page(runs: Sequence[Run]) -> str:
    """HTML of one run, or of several side by side; equal runs give equal text.

    The page loads nothing from outside, and names are escaped and shown as text.
    """
    if len(runs) == 1:
        return _render("run.html.jinja", run=runs[0], **_charts(runs[0]))
    return _render(
        "runs.html.jinja",
        runs=runs,
        depth=_depth_of_runs(runs),
        kinds=_errors_by_kind(runs),
        differing=_differing(runs),
    )


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(ways=WAYS, **values).rstrip() + "\n"


@cache
def _environment() -> Environment:
    environment = make_environment(html=True)
    environment.filters |= {
        "choice_words": choice_words,
        "value": lambda value: json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value,
        "short": lambda value: "-" if value is None else f"{value:#.3g}",
        "share": lambda value: "-" if value is None else f"{value:.1%}",
        "counts": lambda counts, names: f"{sum(counts.get(name, 0) for name in names) / 1e6:,.1f}",
    }
    return environment


def _charts(run: Run) -> dict[str, Any]:
    layers = run.report.layers
    calibrated = [layer for layer in layers if layer.output_error is not None]
    measure: Callable[[LayerReport], float | None] = (
        (lambda layer: layer.output_error) if calibrated else (lambda layer: layer.weight_error)
    )
    what = "output error" if calibrated else "weight error"
    shown = calibrated or layers
    errors = [error for layer in shown if (error := measure(layer)) is not None]
    same_bits = len({layer.choice for layer in layers}) == 1
    return {
        "what": what,
        "worst": sorted(shown, key=lambda layer: (-(measure(layer) or 0.0), layer.name))[:_WORST],
        "by_kind": _depth_by_kind(shown, measure, what),
        "spread": histogram(
            f"Layers by {what}",
            f"Histogram of the {what} of {len(errors)} layers, from {min(errors):.2g} to {max(errors):.2g}; the median "
            f"layer has {sorted(errors)[len(errors) // 2]:.2g}.",
            errors,
            x_label=f"{what} (relative, squared)",
            y_label="layers",
        ),
        "grid": None if same_bits else _bits_grid(layers),
        "trade_off": _trade_off(run.report),
        "unusual": _unusual(run.report.recipe),
    }


def _depth_by_kind(
    layers: Sequence[LayerReport], measure: Callable[[LayerReport], float | None], what: str
) -> list[Chart]:
    """A chart for each kind of layer, all with the same axes; several layers of a kind in a block are averaged."""
    kinds: dict[str, dict[int, list[float]]] = {}
    for layer in layers:
        value = measure(layer)
        if value is not None:
            kinds.setdefault(alike(layer.kind), {}).setdefault(layer.block, []).append(value)
    lines = {
        kind: [(float(block), sum(errors) / len(errors)) for block, errors in sorted(blocks.items())]
        for kind, blocks in kinds.items()
    }
    everything = [value for points in lines.values() for _, value in points]
    span = (min(everything), max(everything))
    charts = []
    for kind, points in lines.items():
        values = [value for _, value in points]
        worst = max(points, key=lambda point: point[1])
        charts.append(
            line_chart(
                kind,
                f"Relative {what} of {kind} from block {points[0][0]:.0f} to block {points[-1][0]:.0f}: from "
                f"{min(values):.2g} to {max(values):.2g}, highest in block {worst[0]:.0f}.",
                [Line(kind, points)],
                x_label="block",
                y_label=what,
                span=span,
                whole_x=True,
            )
        )
    return charts


def _bits_grid(layers: Sequence[LayerReport]) -> dict[str, Any]:
    """Bits by kind and block; a range where layers of one kind in a block differ."""
    grid: dict[str, dict[int, list[Choice]]] = {}
    for layer in layers:
        grid.setdefault(alike(layer.kind), {}).setdefault(layer.block, []).append(layer.choice)
    blocks = sorted({layer.block for layer in layers})
    widest = max(layer.bits for layer in layers)
    rows = [
        (
            kind,
            [
                (choices_in_words(cells[block]), round(4 * max(map(bits_of_choice, cells[block])) / widest))
                if block in cells
                else ("", 0)
                for block in blocks
            ],
        )
        for kind, cells in grid.items()
    ]
    return {"blocks": blocks, "rows": rows}


def _trade_off(report: Report) -> Chart | None:
    plan = report.bit_plan
    if plan is None or not plan.bound:
        return None
    unit = _LOSS_UNITS.get(plan.sensitivity, "no unit")
    here = (report.size.bits_per_weight, plan.predicted_loss)
    uniform = [(point.bits_per_weight, point.predicted_loss) for point in plan.uniform]
    lines = [
        Line("bound on any plan", [(point.bits_per_weight, point.predicted_loss) for point in plan.bound]),
        Line("equal bits for all", uniform, joined=False, labels=[str(point.bits) for point in plan.uniform]),
        Line("this plan", [here], joined=False),
    ]
    return line_chart(
        "Predicted loss against size",
        f"This plan has {here[0]:.3f} stored bits per weight and a predicted loss of {here[1]:.3g} ({unit})."
        + "".join(f" Equal {p.bits} bits: {p.bits_per_weight:.3f} and {p.predicted_loss:.3g}." for p in plan.uniform),
        [line for line in lines if line.points],
        x_label="stored bits per weight of the layers",
        y_label="predicted loss",
    )


def _depth_of_runs(runs: Sequence[Run]) -> Chart | None:
    """Mean output error of each block, one line per run."""
    lines = []
    for run in runs:
        blocks: dict[int, list[float]] = {}
        for layer in run.report.layers:
            if layer.output_error is not None:
                blocks.setdefault(layer.block, []).append(layer.output_error)
        if blocks:
            lines.append(
                Line(run.name, [(float(block), sum(errors) / len(errors)) for block, errors in sorted(blocks.items())])
            )
    if not lines:
        return None
    ranges = "; ".join(
        f"{line.name}: {min(y for _, y in line.points):.2g} to {max(y for _, y in line.points):.2g}" for line in lines
    )
    return line_chart(
        "Output error over depth",
        f"Mean relative output error of the layers of each block. {ranges}.",
        lines,
        x_label="block",
        y_label="output error",
        whole_x=True,
    )


def _errors_by_kind(runs: Sequence[Run]) -> list[tuple[str, list[float | None]]]:
    """Mean output error of every kind of layer in each run; None if the run has no such layers, or no calibration."""
    tables = [{kind.kind: kind.output_error for kind in run.report.kinds} for run in runs]
    return [
        (name, [table.get(name) for table in tables])
        for name in dict.fromkeys(name for table in tables for name in table)
    ]


def _differing(runs: Sequence[Run]) -> list[tuple[str, list[object]]]:
    """Recipe fields whose values differ between the runs."""
    names = dict.fromkeys(name for run in runs for name in run.report.recipe)
    rows = [(name, [run.report.recipe.get(name) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _unusual(recipe: dict[str, object]) -> set[str]:
    """Recipe fields that differ from the default recipe."""
    default = Recipe.load().model_dump(mode="json")
    return {name for name, value in recipe.items() if value != default.get(name)}
