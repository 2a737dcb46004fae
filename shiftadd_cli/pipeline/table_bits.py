"""Sensitivity of embeddings, heads and patch embeddings to their form.

The loss of a form is the divergence of the model from the original, in nats per token, with this weight alone replaced,
as for a linear layer (see `allocation.divergence`). The rows of such a weight err independently, so their divergences
add up. It is therefore enough to replace every so many rows and to multiply. It is also enough to measure one form: for
SmolLM2-135M, divergences of 3, 4 and 5 bits are proportional to the errors in the solver's objective within a tenth. So
`output` measures every eighth row in one form, and compares errors of the forms on a thousand rows; `divergence`
measures the whole weight in each form.

The predicted losses of layers are too high, since the run refines layers and lets each make up for errors of those
before it. Those of tables are too low, since nothing makes up for them. SmolLM2 in files of 45 to 60 MB loses 0.6 to
0.9 of the former and 1.2 to 1.7 of the latter, on text like the calibration and on other text, in the same ratio.
Losses of tables are multiplied by this ratio, so that they can be weighed against those of layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from shiftadd_cli.allocation.divergence import probe_samples
from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.probe_model import ProbeModel
from shiftadd_cli.calibration.table_inputs import table_moment
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.pipeline.tables import PlannedTable, decoded_tiles, encode_weight
from shiftadd_cli.recipe import Recipe

# The form that is measured, whatever the candidates are, so that costs of candidates added later are comparable.
_MEASURED: Choice = 4
# Rows are replaced with this stride, but at least so many; forms are compared on at least so many, evenly spaced.
_STRIDE, _REPLACED_ROWS = 8, 2048
_COMPARED_ROWS = 1024
# The part of a predicted loss that comes true for tables, relative to that for layers.
_AGAINST_LAYERS = 1.9


def measure_tables(
    model: BlockwiseModel,
    samples: Tensor,
    tables: Sequence[PlannedTable],
    recipe: Recipe,
    candidates: Sequence[Choice],
    *,
    every_form: bool,
) -> dict[str, dict[Choice, float]]:
    """The loss of each table in each form, by name, as it compares with predicted losses of layers.

    samples: see `trace_model`. every_form: measure each form on the whole weight. The parts outside the blocks must be
    loaded. Every process of a team measures, and all get the same.

    Raises NumericalError, naming the module, where predictions are not finite.
    """
    replay = ProbeModel(model, probe_samples(samples), recipe.batch_size)
    costs: dict[str, dict[Choice, float]] = {}
    for table in tables:
        reader = table.reader
        moment = None if reader is None else table_moment(model, samples, recipe.batch_size, reader)
        # Choices need no refinement.
        trial = partial(_decoded, recipe=recipe.model_copy(update={"refine_rounds": 0}), moment=moment, model=model)
        measured, stride = (candidates, 1) if every_form else ([_MEASURED], _stride(table, _REPLACED_ROWS, _STRIDE))
        nats = {}
        for choice in measured:
            rows = trial(table, choice, stride)
            nats[choice] = replay.divergence_with(partial(_replacing, replay, table, stride, rows))
            if not math.isfinite(nats[choice]):
                raise NumericalError(
                    f"The predictions are not finite when {table.name} is stored as {table.at(choice, recipe).form}; "
                    "leave it unquantized with `embedding_bits=16`, or fix the source."
                )
        if every_form:
            costs[table.name] = {choice: _AGAINST_LAYERS * loss for choice, loss in nats.items()}
            continue
        few, form = _stride(table, _COMPARED_ROWS), table.objective(moment)
        original = table.weight(model.skeleton)[::few].flatten(1).float().cpu()
        errors = {}
        for choice in dict.fromkeys((*candidates, _MEASURED)):
            difference = original - trial(table, choice, few)
            errors[choice] = float(((difference @ form) * difference).sum(dtype=torch.float64))
        per_error = _AGAINST_LAYERS * stride * nats[_MEASURED] / errors[_MEASURED] if errors[_MEASURED] > 0 else 0.0
        costs[table.name] = {choice: per_error * errors[choice] for choice in candidates}
    return costs


def _stride(table: PlannedTable, rows: int, most: int | None = None) -> int:
    """The stride, at most `most`, that leaves at least so many rows of a table, or all."""
    stride = max(1, table.layout.rows // rows)
    return stride if most is None else min(stride, most)


def _decoded(
    table: PlannedTable, choice: Choice, stride: int, *, recipe: Recipe, moment: Tensor | None, model: BlockwiseModel
) -> Tensor:
    """Every so many rows of a table in this form, float32 `[rows, columns]` on the CPU."""
    weight = table.weight(model.skeleton)[::stride]
    form = table.at(choice, recipe)
    form = replace(form, layout=TableLayout(tuple(weight.shape), form.layout.format))
    tensors, _ = encode_weight(form, weight, recipe, moment, model.context)
    return torch.cat([tile.cpu() for _, tile in decoded_tiles(form.layout, tensors)])


@contextmanager
def _replacing(replay: ProbeModel, table: PlannedTable, stride: int, rows: Tensor) -> Iterator[None]:
    """Within the context, every so many rows of the table, and so of its ties, have these values."""
    weight = table.weight(replay.model.skeleton)[::stride]
    original = weight.clone()
    weight.copy_(rows.view(weight.shape))
    try:
        yield
    finally:
        weight.copy_(original)
