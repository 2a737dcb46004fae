"""Compressed embeddings and output heads in vLLM's terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.vllm_plugin.linear_method import ONE_GPU
from shiftadd_cli.vllm_plugin.loading import close_gates, open_gates
from shiftadd_cli.vllm_plugin.vocabulary import Vocabulary


class ShiftaddTableMethod(QuantizeMethodBase):
    """Computes an embedding or a head with a `Vocabulary`, which becomes the layer's module `vocabulary`."""

    def __init__(self, name: str, layout: TableLayout) -> None:
        """name: of the module in the checkpoint; layout: of its table."""
        self.name, self.layout = name, layout

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Raises ArtifactError for tensor parallelism, and for sizes that differ from the checkpoint's."""
        (rows, columns), padded = self.layout.shape, sum(output_partition_sizes)
        if padded != output_size:
            raise ArtifactError(ONE_GPU)
        if (layer.org_vocab_size, input_size) != (rows, columns):
            raise ArtifactError(
                f"{self.name} is {layer.org_vocab_size} x {input_size} by the model's sizes in config.json, but "
                f"{rows} x {columns} by its quantization_config; quantize the model again."
            )
        layer.vocabulary = Vocabulary(self.name, self.layout, padded=padded, dtype=params_dtype)
        open_gates(layer, layer.vocabulary)

    def process_weights_after_loading(self, layer: Any) -> None:
        close_gates(layer, layer.vocabulary)
        layer.vocabulary.finish()

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """`[...]` of integers → `[..., columns]`."""
        rows: Tensor = layer.vocabulary.look_up(input_)
        return rows

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., columns]` → `[..., rows]`, padded rows included."""
        logits: Tensor = layer.vocabulary.multiply(x, bias)
        return logits

    def tie_weights(self, layer: Any, embed_tokens: Any) -> nn.Module:
        """Let the head `layer` read the table of `embed_tokens` from now on."""
        if isinstance(previous := getattr(layer, "vocabulary", None), Vocabulary):
            close_gates(layer, previous)
        layer.vocabulary = embed_tokens.vocabulary
        head: nn.Module = layer
        return head


class ShiftaddTiedHeadMethod(ShiftaddTableMethod):
    """Computes a head that the checkpoint does not list because the model ties it to the embedding. It has no table
    until it is tied."""

    def __init__(self, name: str) -> None:
        super().__init__(name, TableLayout((0, 0)))

    def create_weights(self, layer: Any, *_: Any, **__: Any) -> None:
        """Do nothing: the table is the embedding's."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if not hasattr(layer, "vocabulary"):
            raise ArtifactError(
                f"The checkpoint has no table for {self.name}, and vLLM does not tie it to the embedding; quantize the "
                "model again with --embedding-bits 16."
            )
