"""The table of 8-bit rows of an input embedding, an output head, or both where they are tied."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shiftadd_cli.bcq.int8 import CODES, SCALE, table_tensors
from shiftadd_cli.runtime.loading import check_values
from shiftadd_cli.runtime.table import Int8Embedding, Int8Linear, hold_table
from shiftadd_cli.vllm_plugin.loading import check_complete, copy_checked


class Vocabulary(nn.Module):
    """A table, see `bcq.int8`, for looking up rows and for multiplying by them.

    vLLM pads vocabularies: rows beyond those of the checkpoint are 0, and so are their logits, which vLLM drops.
    """

    def __init__(self, name: str, rows: int, columns: int, *, padded: int, dtype: torch.dtype | None = None) -> None:
        """name: of the module in the checkpoint; rows: of its table; padded: rows to allocate, at least `rows`; dtype:
        of looked-up rows, the default dtype if None. Tensors start as 0, on torch's default device."""
        super().__init__()
        self.name, self.rows, self.columns = name, rows, columns
        self._loaded: set[str] = set()
        # The dense modules that tables are made from take memory unless they are on meta.
        embedding = hold_table(nn.Embedding(padded, columns, device="meta", dtype=dtype))
        head = hold_table(nn.Linear(columns, padded, bias=False, device="meta", dtype=dtype))
        assert isinstance(embedding, Int8Embedding)
        assert isinstance(head, Int8Linear)
        empty = {
            suffix: torch.zeros(shape, dtype=kind) for suffix, (shape, kind) in table_tensors(padded, columns).items()
        }
        embedding.weight_int8 = nn.Parameter(empty[CODES], requires_grad=False)
        embedding.weight_int8_scale = empty[SCALE]
        head.weight_int8 = embedding.weight_int8
        head.weight_int8_scale = embedding.weight_int8_scale
        self.embedding, self.head = embedding, head

    def stored(self) -> dict[str, torch.dtype]:
        """Suffixes of the stored tensors and their dtypes."""
        return {suffix: kind for suffix, (_, kind) in table_tensors(self.rows, self.columns).items()}

    def load(self, suffix: str, tensor: Tensor, _: object = None) -> None:
        """Take a tensor of the checkpoint. Raises ArtifactError if its shape or dtype differs from the format."""
        copy_checked(getattr(self.embedding, suffix)[: self.rows], tensor, f"{self.name}.{suffix}")
        self._loaded.add(suffix)

    def finish(self) -> None:
        """Raises ArtifactError for missing tensors, and for scales that are not finite."""
        check_complete(
            [f"{self.name}.{suffix}" for suffix in self.stored()], {f"{self.name}.{suffix}" for suffix in self._loaded}
        )
        check_values(self.name, {SCALE: self.embedding.weight_int8_scale}, self.columns)

    def look_up(self, ids: Tensor) -> Tensor:
        """`[...]` of integers → `[..., columns]`."""
        rows: Tensor = self.embedding(ids)
        return rows

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., columns]` → `[..., padded]` in the dtype of `x`; `bias` `[padded]` is added to the rounded product."""
        output: Tensor = self.head(x)
        return output if bias is None else output + bias.to(output.dtype)
