"""Sensitivity of embeddings, heads and patch embeddings to their form.

What a form costs is the divergence of the model from the original, in nats per token, with this weight alone replaced,
as for a linear layer (see `allocation.divergence`). The rows of such a weight err independently, and so do their
divergences add up. It is therefore enough to replace every so many rows and to multiply. It is also enough to measure
one form: for SmolLM2-135M, divergences of 3, 4 and 5 bits are proportional to the errors in the solver's objective
within a tenth. So `output` measures every eighth row in one form, and `divergence` the whole weight in each form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from shiftadd_cli.allocation.divergence import probe_samples
from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.bcq.int8 import decode_table, encode_table
from shiftadd_cli.bcq.solver import quantize_matrices
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.probe_model import ProbeModel
from shiftadd_cli.calibration.table_inputs import table_moment
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.pipeline.tables import PlannedTable
from shiftadd_cli.recipe import Recipe

# The form that is measured, whatever the candidates are, so that costs of candidates added later are comparable.
_MEASURED: Choice = 4
# Rows are replaced with this stride, but at least this many.
_STRIDE, _FEWEST_ROWS = 8, 2048


def measure_tables(
    model: BlockwiseModel,
    samples: Tensor,
    tables: Sequence[PlannedTable],
    recipe: Recipe,
    candidates: Sequence[Choice],
    *,
    every_form: bool,
) -> dict[str, dict[Choice, float]]:
    """The predicted loss of each table in each form, by name.

    samples: see `trace_model`. every_form: measure each form on the whole weight. The parts outside the blocks must be
    loaded. Every process of a team measures, and all get the same.

    Raises NumericalError, naming the module, where predictions are not finite.
    """
    replay = ProbeModel(model, probe_samples(samples), recipe.batch_size)
    costs: dict[str, dict[Choice, float]] = {}
    for table in tables:
        reader = table.reader
        moment = None if reader is None else table_moment(model, samples, recipe.batch_size, reader)
        rows = _Rows(model.skeleton.get_parameter(f"{table.name}.weight"), 1 if every_form else _stride(table))
        measured = candidates if every_form else [_MEASURED]
        forms = {
            choice: rows.solved(table.at(choice, recipe), recipe, moment, model)
            for choice in dict.fromkeys((*candidates, *measured))
        }
        parameter = replay.model.skeleton.get_parameter(f"{table.name}.weight")
        nats = {}
        for choice in measured:
            changed = _with_rows(parameter.data, rows.stride, forms[choice])
            nats[choice] = replay.divergence_with(partial(_holding, parameter, changed))
            if not math.isfinite(nats[choice]):
                raise NumericalError(
                    f"The predictions are not finite when {table.name} is stored as {table.at(choice, recipe).form}; "
                    "leave it unquantized with `embedding_bits=16`, or fix the source."
                )
        if every_form:
            costs[table.name] = nats
            continue
        form = table.objective(moment)
        errors = {choice: rows.error(decoded, form) for choice, decoded in forms.items()}
        per_error = rows.stride * nats[_MEASURED] / errors[_MEASURED] if errors[_MEASURED] > 0 else 0.0
        costs[table.name] = {choice: per_error * errors[choice] for choice in candidates}
    return costs


def _stride(table: PlannedTable) -> int:
    return max(1, min(_STRIDE, table.layout.rows // _FEWEST_ROWS))


class _Rows:
    """Every `stride`-th row of a weight."""

    def __init__(self, weight: nn.Parameter, stride: int) -> None:
        self.stride = stride
        self._rows = weight.detach()[::stride].flatten(1).float()

    def solved(self, table: PlannedTable, recipe: Recipe, moment: Tensor | None, model: BlockwiseModel) -> Tensor:
        """The decoded rows in the form of `table`, float32 `[rows, columns]` on the CPU."""
        if table.layout.packed is None:
            return decode_table(*encode_table(self._rows, table.name)).cpu()
        options = table.options(recipe, moment).replaced(refine_rounds=0)
        device, team = model.device, model.context.team
        form = None if moment is None else moment.to(device)
        solution = quantize_matrices([self._rows.to(device)], [table.name], form, options, team=team)[0]
        return solution.weight.decode().cpu()

    def error(self, decoded: Tensor, form: Tensor) -> float:
        """The error of decoded rows in the quadratic form of the objective."""
        difference = self._rows.cpu() - decoded
        return float(((difference @ form) * difference).sum(dtype=torch.float64))


def _with_rows(weight: Tensor, stride: int, rows: Tensor) -> Tensor:
    """A copy of a weight with every `stride`-th row replaced."""
    changed = weight.clone()
    changed[::stride] = rows.view(-1, *weight.shape[1:]).to(weight)
    return changed


@contextmanager
def _holding(parameter: nn.Parameter, value: Tensor) -> Iterator[None]:
    """Within the context, the parameter, and so its ties, has this value."""
    original = parameter.data
    parameter.data = value
    try:
        yield
    finally:
        parameter.data = original
