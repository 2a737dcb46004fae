"""Junctions of the linears of known architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from block_streams import block_stream
from tiny_models import save_tiny

from shiftadd_cli.blockwise.block_runner import OUTPUT
from shiftadd_cli.blockwise.junctions import find_junctions

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
    stream, specs = block_stream(tmp_path, WINDOWS, 2, dtype=dtype)
    assert find_junctions(stream, [spec.kind for spec in specs]) == JUNCTIONS[family]
