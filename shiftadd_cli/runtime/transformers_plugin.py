"""Loads, saves and dequantizes our checkpoints through transformers (quant_method "shiftadd")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from shiftadd_cli.artifact.format import SUFFIXES, ArtifactFormat
from shiftadd_cli.artifact.linear_attention import SUBMODULE, LinearAttentionFormat
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.runtime.fused_decode.block import fuse_blocks, part_blocks
from shiftadd_cli.runtime.linear import PackedLinear
from shiftadd_cli.runtime.linear_attention.module import LinearAttention
from shiftadd_cli.runtime.linear_attention.place import place_linear_attention
from shiftadd_cli.runtime.loading import (
    Ties,
    check_files,
    check_loaded,
    check_values,
    connect_tables,
    find_module,
    place_tables,
    restore_dense,
)
from shiftadd_cli.runtime.packed import PackedWeight
from shiftadd_cli.runtime.prepare import detach_from_files, prepare_layers
from shiftadd_cli.runtime.remote_code import forget_unused_entry
from shiftadd_cli.runtime.rotation import share_rotations
from shiftadd_cli.runtime.table import Table
from shiftadd_cli.source.experts import SplitExperts, join_experts, split_experts
from shiftadd_cli.version import QUANT_METHOD


class ShiftAddConfig(QuantizationConfigMixin):
    """The `quantization_config` of our config.json, see `artifact.format`; unknown keys are kept.

    Raises ArtifactError if the format is not valid or too new.
    """

    def __init__(self, **config: Any) -> None:
        config["quant_method"] = QUANT_METHOD
        ArtifactFormat.from_dict(config)
        self.__dict__.update(config)

    def layouts(self) -> Mapping[str, PackedLayout]:
        """Layout of every compressed module, by its name in the model."""
        return ArtifactFormat.from_dict(self.__dict__).modules

    def splits_experts(self) -> bool:
        """Whether experts that transformers keeps in stacks are stored one by one."""
        return ArtifactFormat.from_dict(self.__dict__).split_experts

    def linear_attention_format(self) -> LinearAttentionFormat | None:
        """The linear attention layers; None if there are none."""
        return ArtifactFormat.from_dict(self.__dict__).linear_attention

    def table_layouts(self) -> Mapping[str, TableLayout]:
        """Layout of every table, by the name of its module in the model."""
        return ArtifactFormat.from_dict(self.__dict__).tables


class ShiftAddQuantizer(HfQuantizer):
    """Replaces the listed modules with packed linears and tables before transformers loads the tensors."""

    requires_calibration = True
    # Lets transformers apply its weight renaming, weight merging and tensor parallelism to the stored tensors.
    serialized_names = {"weight": list(SUFFIXES)}  # noqa: RUF012 - the base class declares it like this

    quantization_config: ShiftAddConfig
    # The files that the model is loaded from.
    _files: Sequence[str] = ()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Dtype to load a tensor in. Stored tensors keep theirs, since row scales overflow in float16, and so do
        feature maps, which compute in float32."""
        if any(name.endswith(SUFFIXES) or f".{SUBMODULE}." in name for name in converter.target_patterns):
            return None
        result: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return result

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The model's conversions, except those that merge experts, or split them on saving, where experts are stored
        one by one."""
        split = {name: module for name, module in model.named_modules() if isinstance(module, SplitExperts)}
        stacks = {f"{name.rpartition('.')[2]}.{stack}" for name, module in split.items() for stack in module.shapes}
        conversions = [conversion for conversion in weight_conversions if not _merges(conversion, stacks)]
        updated: list[Any] = super().update_weight_conversions(conversions, model)
        return updated

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if self.quantization_config.splits_experts():
            split_experts(model)
        ties = Ties(model)
        for name, layout in self.quantization_config.layouts().items():
            path, module = find_module(model, name)
            members = ties.group(path)
            transposed = _is_conv1d(module)
            if not transposed and not isinstance(module, nn.Linear):
                raise ArtifactError(
                    f"{name} is listed as compressed, but is a {type(module).__name__} in {type(model).__name__}; "
                    "load the checkpoint with the model class it was made from."
                )
            rows, columns = module.weight.T.shape if transposed else module.weight.shape
            if (rows, columns) != (layout.grid.rows, layout.grid.columns):
                raise ArtifactError(
                    f"{name} is {rows} x {columns} by the model's sizes in config.json, but "
                    f"{layout.grid.rows} x {layout.grid.columns} by its quantization_config; quantize the model again."
                )
            has_bias = module.bias is not None
            packed = PackedLinear(layout, bias=has_bias, transposed=transposed, device="meta", dtype=dtype)
            # Layers that share a weight share the packed layer.
            for member in members:
                model.set_submodule(member, packed)
            if len(members) > 1:
                ties.rename(members, "weight", *layout.tensors())
        place_tables(model, self.quantization_config.table_layouts(), dtype)
        if (linear := self.quantization_config.linear_attention_format()) is not None:
            place_linear_attention(model, linear)
        self._files = checkpoint_files or ()
        check_files(model, self._files)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> nn.Module:
        check_loaded(model, model.config.architectures or ())
        for name, module in _packed_modules(model).items():
            stored = {suffix: module.get_parameter(suffix) for suffix in module.layout.tensors()}
            check_values(name, stored, module.layout.grid.columns)
            # transformers makes every floating-point tensor it loads trainable.
            for parameter in stored.values():
                parameter.requires_grad_(False)
        connect_tables(model)
        share_rotations(model)
        prepare_layers(_packed_modules(model).values())
        detach_from_files(model, self._files)
        fuse_blocks(model)
        forget_unused_entry(model.config)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        """Replace every packed layer and every table with the dense layer it was made from, one at a time."""
        # A saved config has its dtype by name.
        named = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        target: torch.dtype = named or torch.get_default_dtype()
        if any(isinstance(module, LinearAttention) for module in model.modules()):
            raise ArtifactError(
                "Linear attention has no dense form, so the model cannot be dequantized; use the model that it was "
                "made from."
            )
        part_blocks(model)
        names: dict[PackedLinear, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, PackedLinear) and not isinstance(module, Table):
                names.setdefault(module, []).append(name)
        ties = Ties(model)
        for module, members in names.items():
            if module.get_parameter("weight_codes").is_meta:
                raise ArtifactError(
                    f"{members[0]} is offloaded to disk; load the model without offloading to dequantize it."
                )
            dense = _dense(module, target)
            for member in members:
                model.set_submodule(member, dense)
            if len(members) > 1:
                first, *others = module.layout.tensors()
                ties.rename(members, first, "weight")
                for suffix in others:
                    ties.rename(members, suffix)
        restore_dense(model, target)
        join_experts(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Make transformers load checkpoints of quant_method "shiftadd"; calling it again changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(ShiftAddConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(ShiftAddQuantizer)


def _packed_modules(model: nn.Module) -> dict[str, PackedWeight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def _merges(conversion: Any, stacks: set[str]) -> bool:
    """Whether a transformers conversion produces one of `stacks`, matched by the last two parts of its name."""
    from transformers.core_model_loading import WeightConverter

    targets = [pattern.replace("\\", "") for pattern in conversion.target_patterns]
    ends = [".".join(target.split(".")[-2:]) for target in targets]
    return isinstance(conversion, WeightConverter) and any(end in stacks for end in ends)


def _is_conv1d(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _dense(packed: PackedLinear, dtype: torch.dtype) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    weight = packed.decode().to(dtype)
    dense: nn.Module
    if packed.transposed:
        with torch.device("meta"):
            dense = Conv1D(packed.out_features, packed.in_features)
        weight = weight.T.contiguous()
    else:
        has_bias = packed.bias is not None
        dense = nn.Linear(packed.in_features, packed.out_features, bias=has_bias, device="meta")
    dense.weight = nn.Parameter(weight)
    if packed.bias is not None:
        dense.bias = nn.Parameter(packed.bias.detach().to(dtype))
    return dense.train(packed.training)
