"""Compressed matrices of random bytes (every byte is a valid code) and small checkpoints made of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from formats import matrix_format
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shiftadd_cli.artifact.format import ArtifactFormat
from shiftadd_cli.artifact.writer import ArtifactWriter
from shiftadd_cli.bcq.int8 import decode_table, encode_table
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight
from shiftadd_cli.source.experts import split_experts

FORMATS = ("pot", "apot2", "apot3", "float")
COMMON = matrix_format(bits=3, group_size=16, group_rows=1, scale_format="apot2", row_scale=True, offset=False)


def random_weight(layout: PackedLayout, seed: int = 0) -> QuantizedWeight:
    """Random stored tensors; the decoded entries are about as large as a linear layer's weights."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (shape, dtype) in layout.tensors().items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, shape, dtype=dtype, generator=g)
        elif name == "weight_column_ids":
            tensors[name] = torch.randperm(layout.grid.columns, generator=g)[: layout.outliers].sort().values.to(dtype)
        elif name == "weight_row_scale":
            tensors[name] = (0.05 + 0.2 * torch.rand(shape, generator=g)).to(dtype)
        else:
            tensors[name] = torch.rand(shape, generator=g).to(dtype)
    return QuantizedWeight(layout, tensors)


def random_matrix(rows: int, seed: int, columns: int = 36, **changes: Any) -> QuantizedWeight:
    """A random matrix whose rotation and outlier columns are the same for every seed, as in layers of one input."""
    weight = random_weight(PackedLayout(COMMON.replaced(**changes), rows, columns), seed)
    # From a matrix of one row, because the number of draws before them depends on the rows.
    same = random_weight(PackedLayout(COMMON.replaced(**changes), 1, columns), 99).tensors
    shared = {name: same[name] for name in ("weight_signs", "weight_column_ids") if name in same}
    return QuantizedWeight(weight.layout, weight.tensors | shared)


class Checkpoint(NamedTuple):
    """A checkpoint on disk and its dense model in float32."""

    folder: Path
    dense: PreTrainedModel


def write_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    *,
    common: MatrixFormat = COMMON,
    own: dict[str, MatrixFormat] | None = None,
    shard_bytes: int = 20_000,
    tables: bool | MatrixFormat = False,
    split: bool = True,
) -> Checkpoint:
    """Replace all linears except the head by random matrices. own: formats of modules, by the end of their name.

    tables: store the input embedding and the head as 8-bit rows (True) or in this format; split: stacked experts are
    linears too.
    """
    model = copy.deepcopy(model)
    split = split and bool(split_experts(model))
    dense = copy.deepcopy(model)
    modules: dict[str, PackedLayout] = {}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or name == "lm_head":
            continue
        transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.T.shape if transposed else module.weight.shape
        form = next((f for end, f in (own or {}).items() if name.endswith(end)), common)
        weight = random_weight(PackedLayout(form, rows, columns), seed=len(modules))
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in weight.tensors.items()}
        modules[name] = weight.layout
        decoded = weight.decode()
        dense.get_submodule(name).weight.data = decoded.T.contiguous() if transposed else decoded
    in_planes = tables if isinstance(tables, MatrixFormat) else None
    layouts = _replace_tables(dense, tensors, in_planes) if tables else {}
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    config["quantization_config"] = ArtifactFormat(common, modules, layouts, split).to_dict()
    with ArtifactWriter(folder, shard_bytes=shard_bytes) as writer:
        writer.plan({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish(config, {"schema_version": 1})
    return Checkpoint(folder, dense)


def _replace_tables(
    dense: PreTrainedModel, tensors: dict[str, torch.Tensor], form: MatrixFormat | None
) -> dict[str, TableLayout]:
    names = {id(module): name for name, module in dense.named_modules()}
    layouts = {}
    for module in (dense.get_input_embeddings(), dense.get_output_embeddings()):
        name = names[id(module)]
        if (weight := tensors.pop(f"{name}.weight", None)) is None:  # tied
            continue
        layout = layouts[name] = TableLayout(tuple(weight.shape), form)
        if layout.packed is None:
            codes, scale = encode_table(weight, name)
            stored, decoded = {"weight_int8": codes, "weight_int8_scale": scale}, decode_table(codes, scale)
        else:
            packed = random_weight(layout.packed, seed=1000 + len(layouts))
            stored, decoded = packed.tensors, packed.decode()
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
        module.get_parameter("weight").data.copy_(decoded)
    return layouts


def edit_config(folder: Path, **changes: Any) -> None:
    """Change entries of the folder's `quantization_config`; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config["quantization_config"][key] = value
        if value is None:
            del config["quantization_config"][key]
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of a single-file checkpoint, or remove those given as None; its checksum no longer matches."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path, {"format": "pt"})
