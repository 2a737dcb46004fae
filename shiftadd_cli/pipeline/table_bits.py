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
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from shiftadd_cli.allocation.divergence import probe_samples
from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.probe_model import ProbeModel
from shiftadd_cli.calibration.table_inputs import table_moment
from shiftadd_cli.context import Context
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.pipeline.tables import PlannedTable, decoded_tiles, encode_weight
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
        rows, form = _Rows(table.weight(model.skeleton), 1 if every_form else _stride(table)), table.objective(moment)
        parameter = replay.model.skeleton.get_parameter(f"{table.name}.weight")
        measured = candidates if every_form else [_MEASURED]
        # Choices need no refinement.
        quick = recipe.model_copy(update={"refine_rounds": 0})
        errors, nats = {}, {}
        for choice in dict.fromkeys((*candidates, *measured)):
            decoded = rows.decoded(table.at(choice, quick), quick, moment, model.context)
            errors[choice] = rows.error(decoded, form)
            if choice not in measured:
                continue
            nats[choice] = replay.divergence_with(partial(_holding, parameter, rows.within(parameter.data, decoded)))
            if not math.isfinite(nats[choice]):
                raise NumericalError(
                    f"The predictions are not finite when {table.name} is stored as {table.at(choice, recipe).form}; "
                    "leave it unquantized with `embedding_bits=16`, or fix the source."
                )
        if every_form:
            costs[table.name] = nats
            continue
        per_error = rows.stride * nats[_MEASURED] / errors[_MEASURED] if errors[_MEASURED] > 0 else 0.0
        costs[table.name] = {choice: per_error * errors[choice] for choice in candidates}
    return costs


def _stride(table: PlannedTable) -> int:
    return max(1, min(_STRIDE, table.layout.rows // _FEWEST_ROWS))


class _Rows:
    """Every `stride`-th row of a weight."""

    def __init__(self, weight: Tensor, stride: int) -> None:
        self.stride = stride
        self._rows = weight[::stride]

    def decoded(self, table: PlannedTable, recipe: Recipe, moment: Tensor | None, context: Context) -> Tensor:
        """The decoded rows in the form of `table`, float32 `[rows, columns]` on the CPU."""
        rows = replace(table, layout=TableLayout(tuple(self._rows.shape), table.layout.format))
        tensors, _ = encode_weight(rows, self._rows, recipe, moment, context)
        return torch.cat([tile.cpu() for _, tile in decoded_tiles(rows.layout, tensors)])

    def within(self, weight: Tensor, decoded: Tensor) -> Tensor:
        """A copy of the weight with these rows instead."""
        changed = weight.clone()
        changed[:: self.stride] = decoded.view(-1, *weight.shape[1:]).to(weight)
        return changed

    def error(self, decoded: Tensor, form: Tensor) -> float:
        """The error of decoded rows in the quadratic form of the objective."""
        difference = self._rows.flatten(1).float().cpu() - decoded
        return float(((difference @ form) * difference).sum(dtype=torch.float64))


@contextmanager
def _holding(parameter: nn.Parameter, value: Tensor) -> Iterator[None]:
    """Within the context, the parameter, and so its ties, has this value."""
    original = parameter.data
    parameter.data = value
    try:
        yield
    finally:
        parameter.data = original
