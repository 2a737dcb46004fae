"""The table of an input embedding, an output head, or both where they are tied."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.runtime.loading import check_values
from shiftadd_cli.runtime.packed import PackedWeight
from shiftadd_cli.runtime.prepare import prepare_layers
from shiftadd_cli.runtime.table import hold_table
from shiftadd_cli.vllm_plugin.loading import check_complete, copy_checked


class Vocabulary(nn.Module):
    """A table for looking up rows and for multiplying by them.

    vLLM pads vocabularies, and drops the logits of rows beyond those of the checkpoint. Where rows have scales of their
    own, these logits are 0.
    """

    def __init__(self, name: str, layout: TableLayout, *, padded: int, dtype: torch.dtype | None = None) -> None:
        """name: of the module in the checkpoint; layout: of its table; padded: rows to allocate, at least those of the
        table; dtype: of looked-up rows, the default dtype if None. Tensors start as 0, on torch's default device.

        Raises ArtifactError for groups whose height depends on the number of rows.
        """
        super().__init__()
        form, columns = layout.format, layout.columns
        if form is not None and isinstance(form.group_rows, str) and form.group_rows != "all" and padded > layout.rows:
            raise ArtifactError(
                f"vLLM pads {name} to {padded} rows, but its groups are {form.group_rows} of the rows; quantize the "
                "model again with --embedding-bits 8."
            )
        self.name, self.layout = name, layout
        self._loaded: set[str] = set()
        larger = TableLayout((padded, columns), form)
        # The dense modules that tables are made from take memory unless they are on meta.
        self.embedding = hold_table(nn.Embedding(padded, columns, device="meta", dtype=dtype), larger)
        self.head = hold_table(nn.Linear(columns, padded, bias=False, device="meta", dtype=dtype), larger)
        for table in (self.embedding, self.head):
            table.to_empty(device=torch.get_default_device())
        for suffix in self.embedding.suffixes:
            getattr(self.embedding, suffix).zero_()
        self.head.connect(self.embedding)

    def stored(self) -> dict[str, torch.dtype]:
        """Suffixes of the stored tensors and their dtypes."""
        return {suffix: kind for suffix, (_, kind) in self.layout.tensors().items()}

    def load(self, suffix: str, tensor: Tensor, _: object = None) -> None:
        """Take a tensor of the checkpoint. Raises ArtifactError if its shape or dtype differs from the format."""
        shape, _kind = self.layout.tensors()[suffix]
        # A tensor with a number for every row is shorter than its padded one.
        copy_checked(getattr(self.embedding, suffix)[: shape[0]], tensor, f"{self.name}.{suffix}")
        self._loaded.add(suffix)

    def finish(self) -> None:
        """Choose kernels, once everything is loaded; calling it again changes nothing.

        Raises ArtifactError for missing tensors, and for values that no writer stores.
        """
        check_complete(
            [f"{self.name}.{suffix}" for suffix in self.stored()], {f"{self.name}.{suffix}" for suffix in self._loaded}
        )
        stored = {suffix: getattr(self.embedding, suffix) for suffix in self.stored()}
        check_values(self.name, stored, self.layout.columns)
        prepare_layers(table for table in (self.embedding, self.head) if isinstance(table, PackedWeight))

    def look_up(self, ids: Tensor) -> Tensor:
        """`[...]` of integers → `[..., columns]`."""
        rows: Tensor = self.embedding(ids)
        return rows

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., columns]` → `[..., padded]` in the dtype of `x`; `bias` `[padded]` is added to the rounded product."""
        output: Tensor = self.head(x)
        return output if bias is None else output + bias.to(output.dtype)
