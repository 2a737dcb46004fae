"""The plugin in vLLM's own layers, if vLLM is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from artifacts import COMMON, Checkpoint, write_checkpoint
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import Tensor, nn
from vllm_world import vllm_world

from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.vllm_plugin import register

pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm)")

HIDDEN, INNER, HEADS, KEYS, VOCABULARY = 48, 100, 4, 2, 320
SHARDS = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v"),
          "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}  # fmt: skip
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    register()
    register()
    with vllm_world():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Llama whose value projections have other bits than queries and keys."""
    own = {"v_proj": COMMON.replaced(bits=2)}
    folder = tmp_path_factory.mktemp("llama") / "out"
    return write_checkpoint(tiny_model("llama"), folder, own=own, tables=True, shard_bytes=10**9)


def configured(folder: Path, **model: Any) -> Any:
    from vllm.model_executor.layers.quantization import get_quantization_config

    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = get_quantization_config("shiftadd").from_config(stored)
    config.packed_modules_mapping = PACKED
    config.maybe_update_config("out", hf_config=SimpleNamespace(**model))
    return config


def layers_of_a_block(config: Any) -> dict[str, nn.Module]:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    start, common = "model.layers.0.", {"bias": False, "quant_config": config}
    attention, mlp = start + "self_attn.", start + "mlp."
    return {
        attention + "qkv_proj": QKVParallelLinear(
            HIDDEN, HIDDEN // HEADS, HEADS, KEYS, prefix=attention + "qkv_proj", **common
        ),
        attention + "o_proj": RowParallelLinear(HIDDEN, HIDDEN, prefix=attention + "o_proj", **common),
        mlp + "gate_up_proj": MergedColumnParallelLinear(HIDDEN, [INNER, INNER], prefix=mlp + "gate_up_proj", **common),
        mlp + "down_proj": RowParallelLinear(INNER, HIDDEN, prefix=mlp + "down_proj", **common),
    }


def load(layers: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    """Load as vLLM's models do: parameters by name, fused ones with their shard, then the last step of each method."""
    parameters = {
        f"{name}.{suffix}": gate for name, layer in layers.items() for suffix, gate in layer.named_parameters()
    }
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        parent, dot, last = module.rpartition(".")
        fused, *shard = SHARDS.get(last, (last,))
        parameter: Any = parameters.get(f"{parent}{dot}{fused}.{suffix}")
        if parameter is not None:
            parameter.weight_loader(parameter, tensor, *shard)
    for layer in layers.values():
        method: Any = layer.quant_method
        method.process_weights_after_loading(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_of_a_block_match_the_dense_model(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        layers = layers_of_a_block(configured(checkpoint.folder))
    finally:
        torch.set_default_dtype(torch.float32)
    load(layers, load_file(checkpoint.folder / "model.safetensors"))
    dense = checkpoint.dense.model.layers[0]
    fused = {
        "qkv_proj": (dense.self_attn.q_proj, dense.self_attn.k_proj, dense.self_attn.v_proj),
        "o_proj": (dense.self_attn.o_proj,),
        "gate_up_proj": (dense.mlp.gate_proj, dense.mlp.up_proj),
        "down_proj": (dense.mlp.down_proj,),
    }
    for name, layer in layers.items():
        parts = fused[name.rpartition(".")[2]]
        x = torch.randn(3, parts[0].in_features).to(dtype)
        with torch.inference_mode():
            output, bias = layer(x)
            expected = torch.cat([part(x.float()) for part in parts], dim=-1)
        assert bias is None
        assert output.dtype == dtype
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(
            output.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )
        assert not [suffix for suffix, _ in layer.named_parameters(recurse=False)]


def test_embedding_and_head_read_their_tables(checkpoint: Checkpoint) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    config = configured(checkpoint.folder, tie_word_embeddings=False)
    # vLLM's Llama does not tell the embedding its name.
    layers = {
        "model.embed_tokens": VocabParallelEmbedding(VOCABULARY, HIDDEN, quant_config=config),
        "lm_head": ParallelLMHead(VOCABULARY, HIDDEN, quant_config=config, prefix="lm_head"),
    }
    load(layers, load_file(checkpoint.folder / "model.safetensors"))
    ids, x = torch.tensor([0, 5, 319]), torch.randn(3, HIDDEN)
    assert torch.equal(layers["model.embed_tokens"](ids), checkpoint.dense.model.embed_tokens(ids))
    logits = layers["lm_head"].quant_method.apply(layers["lm_head"], x, bias=None)
    torch.testing.assert_close(logits[:, :VOCABULARY], checkpoint.dense.lm_head(x), rtol=1e-4, atol=1e-4)


def test_tied_head_reads_the_table_of_the_embedding(tmp_path: Path) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    stored = write_checkpoint(tiny_model("qwen2"), tmp_path / "out", tables=True, shard_bytes=10**9)
    config = configured(stored.folder, tie_word_embeddings=True)
    embedding = VocabParallelEmbedding(VOCABULARY, 32, quant_config=config, prefix="model.embed_tokens")
    head = ParallelLMHead(VOCABULARY, 32, quant_config=config, prefix="lm_head").tie_weights(embedding)
    load({"model.embed_tokens": embedding, "lm_head": head}, load_file(stored.folder / "model.safetensors"))
    x = torch.randn(3, 32)
    logits = head.quant_method.apply(head, x)
    torch.testing.assert_close(logits[:, :VOCABULARY], stored.dense.lm_head(x), rtol=1e-4, atol=1e-4)


def test_unlisted_layers_stay_unquantized(checkpoint: Checkpoint) -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    layer = ReplicatedLinear(8, 4, quant_config=configured(checkpoint.folder), prefix="model.other")
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)
    assert layer.weight.shape == (4, 8)


def test_tensor_parallelism_mixtures_and_other_sizes_are_refused(checkpoint: Checkpoint) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    config, name = configured(checkpoint.folder), "model.layers.0.self_attn.o_proj"
    method = config.get_quant_method(RowParallelLinear(HIDDEN, HIDDEN, quant_config=config, prefix=name), name)
    with pytest.raises(ArtifactError, match="--tensor-parallel-size 1"):
        method.create_weights(nn.Module(), HIDDEN // 2, [HIDDEN], HIDDEN, HIDDEN, torch.float32)
    with pytest.raises(ArtifactError, match=r"the layer is 40 x 48 by the model's sizes in config.json, but 48 x 48"):
        method.create_weights(nn.Module(), HIDDEN, [40], HIDDEN, 40, torch.float32)
    stored = json.loads((checkpoint.folder / "config.json").read_text())["quantization_config"]
    with pytest.raises(ArtifactError, match=r"experts of a mixture .* shiftadd export OUT -o DIR --format dense"):
        type(config).from_config(stored | {"split_experts": True})


def test_renamed_modules_are_found(checkpoint: Checkpoint) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    config = configured(checkpoint.folder)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert "language_model.model.layers.0.mlp.down_proj" in config.layouts
    assert "language_model.model.embed_tokens" in config.tables
