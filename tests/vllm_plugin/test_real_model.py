"""A model that vLLM builds and loads from one of our checkpoints, if vLLM is installed.

Its attention needs vLLM's compiled operators, so it is not called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from artifacts import COMMON, Checkpoint, write_checkpoint
from safetensors.torch import load_file
from tiny_models import tiny_model
from vllm_world import vllm_world

from shiftadd_cli.vllm_plugin import register

pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm)")


class Loaded(NamedTuple):
    checkpoint: Checkpoint
    model: Any
    chosen: str


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.model_loader.utils import process_weights_after_loading
    from vllm.model_executor.models.llama import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama") / "out"
    own = {"v_proj": COMMON.replaced(bits=2)}
    checkpoint = write_checkpoint(tiny_model("llama"), folder, own=own, tables=True, shard_bytes=10**9)
    register()
    with vllm_world():
        settings = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True)
        config = VllmConfig(model_config=settings)
        with set_current_vllm_config(config):
            model = LlamaForCausalLM(vllm_config=config)
            model.load_weights(load_file(folder / "model.safetensors").items())
            process_weights_after_loading(model, settings, torch.device("cpu"))
            yield Loaded(checkpoint, model, settings.quantization)


def test_vllm_chooses_the_plugin_from_the_checkpoint(loaded: Loaded) -> None:
    assert loaded.chosen == "shiftadd"


@pytest.mark.parametrize("block", [0, 1])
def test_blocks_match_the_dense_model(loaded: Loaded, block: int) -> None:
    mine, dense = loaded.model.model.layers[block], loaded.checkpoint.dense.model.layers[block]
    x, attention = torch.randn(3, 48), dense.self_attn
    with torch.inference_mode():
        fused = mine.self_attn.qkv_proj(x)[0]
        apart = torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], dim=-1)
        torch.testing.assert_close(fused, apart, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.self_attn.o_proj(x)[0], attention.o_proj(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.mlp(x), dense.mlp(x), rtol=1e-4, atol=1e-4)
    # Values have other bits than queries and keys.
    assert [len(layer.compressed.parts) for layer in (mine.self_attn.qkv_proj, mine.mlp.gate_up_proj)] == [2, 1]


def test_embedding_and_logits_match_the_dense_model(loaded: Loaded) -> None:
    ids, x, dense = torch.tensor([1, 5, 319]), torch.randn(3, 48), loaded.checkpoint.dense
    assert torch.equal(loaded.model.embed_input_ids(ids), dense.model.embed_tokens(ids))
    torch.testing.assert_close(loaded.model.compute_logits(x), dense.lm_head(x), rtol=1e-4, atol=1e-4)
