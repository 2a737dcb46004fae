"""The `quantization_config` of a checkpoint in vLLM's terms: how each layer is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from shiftadd_cli.artifact.format import ArtifactFormat
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.version import QUANT_METHOD
from shiftadd_cli.vllm_plugin.linear_method import ShiftaddLinearMethod
from shiftadd_cli.vllm_plugin.parts import part_names
from shiftadd_cli.vllm_plugin.table_method import ShiftaddTableMethod, ShiftaddTiedHeadMethod


class ShiftaddConfig(QuantizationConfig):
    """Layouts of the compressed modules and of the tables, by the names that vLLM gives their modules."""

    def __init__(self, form: ArtifactFormat) -> None:
        """Raises ArtifactError for mixtures of experts and for linear attention."""
        super().__init__()
        if form.linear_attention is not None:
            raise ArtifactError("shiftadd has no linear attention in vLLM; load the checkpoint with transformers.")
        if form.split_experts:
            raise ArtifactError(
                "shiftadd has no kernels for the experts of a mixture in vLLM; export the checkpoint for it: "
                "shiftadd export OUT -o DIR --format dense."
            )
        self.layouts: Mapping[str, PackedLayout] = form.modules
        self.tables: Mapping[str, TableLayout] = form.tables
        self.ties_head = False

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        # The lowest capability that the tests compile the Triton kernels for.
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        # Everything is in config.json.
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ShiftaddConfig:
        """From the `quantization_config` of config.json. Raises ArtifactError if it is not valid or too new."""
        return cls(ArtifactFormat.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Note whether the head is tied to the embedding; vLLM calls this with the model's configuration."""
        self.ties_head = bool(getattr(hf_config, "tie_word_embeddings", False))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the listed modules; vLLM calls this with its mapping of the checkpoint's names."""
        self.layouts = hf_to_vllm_mapper.apply_dict(dict(self.layouts))
        self.tables = hf_to_vllm_mapper.apply_dict(dict(self.tables))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How the module `prefix` is computed; None means as vLLM would without us.

        Raises ArtifactError for a fused layer that is only partly compressed.
        """
        if isinstance(layer, LinearBase):
            names = part_names(prefix, self.packed_modules_mapping, self.layouts)
            if not names:
                return UnquantizedLinearMethod()
            return ShiftaddLinearMethod({name: self.layouts[name] for name in names})
        if isinstance(layer, ParallelLMHead):
            return self._head_method(prefix or "lm_head")
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding_method(prefix, (layer.org_vocab_size, layer.embedding_dim))
        return None

    def _head_method(self, name: str) -> QuantizeMethodBase | None:
        if name in self.tables:
            return ShiftaddTableMethod(name, self.tables[name])
        return ShiftaddTiedHeadMethod(name) if self.ties_head and self.tables else None

    def _embedding_method(self, name: str, shape: tuple[int, ...]) -> QuantizeMethodBase | None:
        # Some models of vLLM (Llama) do not pass an embedding its name. Tables are listed in the order of the model,
        # the embedding before the head.
        listed = name or next((table for table, layout in self.tables.items() if layout.shape == shape), "")
        return ShiftaddTableMethod(listed, self.tables[listed]) if listed in self.tables else None
