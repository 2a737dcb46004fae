"""Junctions of the linears of known architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from shiftadd_cli.blockwise.block_runner import OUTPUT, BlockStream
from shiftadd_cli.blockwise.junctions import find_junctions
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.source import find_structure, open_source

WINDOWS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
JUNCTIONS = {
    "llama": {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": OUTPUT},
    "gpt2": {"attn.c_proj": "ln_2", "mlp.c_proj": OUTPUT},
    "bloom": {"self_attention.dense": "post_attention_layernorm", "mlp.dense_4h_to_h": OUTPUT},
    # A norm reads the output before it is added.
    "gemma3": {},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", JUNCTIONS)
def test_outputs_join_the_hidden_states_where_the_architecture_adds_them(
    tmp_path: Path, family: str, dtype: str
) -> None:
    save_tiny(family, tmp_path)
    source = open_source(str(tmp_path), dtype=dtype)
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    trace = trace_model(BlockwiseModel(source, structure), WINDOWS, 2)
    source.materialise([structure.blocks[0]])
    block = source.skeleton().get_submodule(structure.blocks[0])
    calls = {index: block_calls[0] for index, block_calls in trace.calls.items()}
    stream = BlockStream("block", block, trace.hidden, calls)
    kinds = [spec.kind for spec in structure.linears if spec.block == 0]
    assert find_junctions(stream, kinds) == JUNCTIONS[family]
