"""Compares the forms of scales: relative output error against stored bits per weight.

Takes some blocks of a model, calibrates their linears on real text, and quantizes each in every requested form: scale
format, group size, offsets, rotation. Prints the geometric mean over the linears of ‖(W − Ŵ) X‖² / ‖W X‖² next to the
stored bits, and marks the forms that no other form beats at the same or fewer bits.

    python scripts/benchmark_scales.py demo --blocks 3,10,20,29 --bits 2,3,4 --work out/scales

Shift layers (`--shifts`) have no such forms; they are in the same table.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import geometric_mean

import click
from torch import Tensor

from shiftadd_cli.allocation.sensitivity import walk_blocks
from shiftadd_cli.bcq.choices import PLANES, Choice, Primitive, parse_choice, parts_of_choice
from shiftadd_cli.bcq.solver import SolverOptions, quantize_matrices
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.cli.flags import usage_error
from shiftadd_cli.cli.summary import table
from shiftadd_cli.context import Context
from shiftadd_cli.errors import ShiftaddError
from shiftadd_cli.pipeline.calibration import draw_calibration
from shiftadd_cli.pipeline.plan import make_plan
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import LinearSpec, open_source


@dataclass(frozen=True)
class Form:
    """The storage of a matrix: recipe fields of the same names."""

    bits: int
    scale_format: str
    group_size: int | str
    offset: bool
    rotation: str
    primitive: Primitive = "bcq"


@dataclass(frozen=True)
class Row:
    """A form, its stored bits per weight over all measured linears, and the geometric mean of relative errors."""

    form: Form
    stored_bits: float
    error: float


class Measure:
    """Quantizes the linears of some blocks in every form, on their inputs in the original model."""

    def __init__(self, forms: Sequence[Form], blocks: Iterable[int], options: SolverOptions) -> None:
        self._forms, self._blocks, self._options = forms, set(blocks), options
        self.errors: dict[Form, list[float]] = {form: [] for form in forms}
        self.stored: dict[Form, int] = dict.fromkeys(forms, 0)
        self.weights = 0

    def __call__(
        self, specs: Sequence[LinearSpec], weights: Sequence[Tensor], hessian: Tensor | None
    ) -> list[dict[Choice, float]]:
        if specs[0].block in self._blocks and hessian is not None:
            self.weights += sum(weight.numel() for weight in weights)
            for form in self._forms:
                options = self._options.replaced(format=self._options.format.replaced(**asdict(form)))
                for solution in quantize_matrices(weights, [spec.name for spec in specs], hessian, options):
                    self.errors[form].append(solution.output_error or 0.0)
                    self.stored[form] += solution.weight.layout.nbytes
        return [{} for _ in specs]

    def rows(self) -> list[Row]:
        """Rows in the order of the forms."""
        return [
            Row(form, 8 * self.stored[form] / self.weights, geometric_mean(self.errors[form])) for form in self._forms
        ]


def unbeaten(rows: Sequence[Row]) -> set[Form]:
    """Forms for which no other form has a smaller error at the same or fewer stored bits."""
    return {row.form for row in rows if not any(o.stored_bits <= row.stored_bits and o.error < row.error for o in rows)}


def measure_forms(model: str, recipe: Recipe, forms: Sequence[Form], blocks: Sequence[int]) -> list[Row]:
    """Rows of all forms on the linears of these blocks. Raises ShiftaddError for unreadable inputs."""
    plan = make_plan(open_source(model, dtype=recipe.dtype), recipe)
    calibration = draw_calibration(plan)
    if calibration is None or not set(blocks) <= set(range(len(plan.structure.blocks))):
        raise click.UsageError(f"Give a calibration text, and blocks from 0 to {len(plan.structure.blocks) - 1}.")
    # Blocks after the last requested one are not run.
    last = max(blocks)
    structure = replace(
        plan.structure,
        blocks=plan.structure.blocks[: last + 1],
        linears=tuple(spec for spec in plan.structure.linears if spec.block <= last),
    )
    source, measure = plan.source, Measure(forms, blocks, recipe.solver_options)
    source.materialise(plan.structure.outside)
    trace = trace_model(BlockwiseModel(source, plan.structure), calibration.samples, recipe.batch_size)
    walk_blocks(BlockwiseModel(source, structure, Context.of("cpu")), trace, measure)
    return measure.rows()


def as_table(rows: Sequence[Row]) -> str:
    """Rows by bits, then by stored bits per weight; `*` marks unbeaten forms."""
    lines = []
    for bits in dict.fromkeys(row.form.bits for row in rows):
        alike = [row for row in rows if row.form.bits == bits]
        best = unbeaten(alike)
        for row in sorted(alike, key=lambda row: row.stored_bits):
            form = row.form
            lines.append(
                (
                    str(form.bits),
                    form.scale_format if form.primitive == PLANES else form.primitive,
                    str(form.group_size),
                    "yes" if form.offset else "no",
                    form.rotation,
                    f"{row.stored_bits:.3f}",
                    f"{row.error:.5f}{' *' if form in best else ''}",
                )
            )
    return table(("bits", "scales", "group", "offset", "rotation", "bits/weight", "output error"), lines)


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--blocks", default="3,10,20,29", show_default=True, help="Indices of the blocks to measure.")
@click.option("--bits", default="2,3,4", show_default=True)
@click.option("--formats", default="pot,apot2,apot3,float", show_default=True)
@click.option("--groups", default="32,64,128,all", show_default=True)
@click.option("--offsets", type=click.Choice(("no", "yes", "both")), default="both", show_default=True)
@click.option("--rotations", default="hadamard", show_default=True, help="One or both of none,hadamard.")
@click.option("--shifts", default="", help="Shift layers to add, such as shift1-3,shift2-4.")
@click.option("--calibration", default="builtin", show_default=True)
@click.option("--samples", type=int, default=32, show_default=True)
@click.option("--seq-len", type=int, default=512, show_default=True)
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the table.")
def main(
    model: str,
    blocks: str,
    bits: str,
    formats: str,
    groups: str,
    offsets: str,
    rotations: str,
    shifts: str,
    calibration: str,
    samples: int,
    seq_len: int,
    work: Path,
) -> None:
    """Compare the forms of scales on MODEL (a hub id, a folder, a .gguf file or `demo`)."""
    try:
        fields = {"calibration": calibration, "samples": samples, "seq_len": seq_len}
        recipe = Recipe.load("equal-bits", fields)
        forms = [
            Form(int(width), scales, group if group == "all" else int(group), offset, rotation)
            for width, scales, group, offset, rotation in itertools.product(
                _words(bits),
                _words(formats),
                _words(groups),
                {"no": [False], "yes": [True], "both": [False, True]}[offsets],
                _words(rotations),
            )
        ]
        for choice, rotation in itertools.product(map(parse_choice, _words(shifts)), _words(rotations)):
            primitive, width = parts_of_choice(choice)
            # Shift layers have one scale per row, whatever the scale fields say.
            forms.append(Form(width, "pot", "all", False, rotation, primitive))
        for form in forms:
            # An invalid form fails before any work, with the recipe's own message.
            Recipe.load("equal-bits", fields | asdict(form))
        rows = measure_forms(model, recipe, forms, [int(block) for block in _words(blocks)])
    except (ShiftaddError, ValueError) as error:
        raise usage_error(error) from error
    work.mkdir(parents=True, exist_ok=True)
    (work / "scales.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    (work / "scales.txt").write_text(as_table(rows) + "\n", encoding="utf-8")
    click.echo(as_table(rows))


if __name__ == "__main__":
    sys.exit(main())
