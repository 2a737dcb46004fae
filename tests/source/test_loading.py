"""Parts of a model in and out of memory, against transformers loading all of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, VOCAB_SIZE, save_tiny, save_tiny_gguf
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import find_structure, open_source
from shiftadd_cli.source.experts import join_experts


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(0))


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def assert_same(model: nn.Module, reference: nn.Module) -> None:
    loaded, expected = tensors_of(model), tensors_of(reference)
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert loaded[name].dtype == value.dtype, name
        assert torch.equal(loaded[name], value), name


def in_memory(model: nn.Module) -> set[str]:
    return {name for name, value in tensors_of(model).items() if not value.is_meta}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_walking_the_parts_gives_the_whole_model(
    family: str, dtype: torch.dtype, tmp_path: Path, tokens: torch.Tensor
) -> None:
    save_tiny(family, tmp_path, sharded=True, dtype=dtype)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    source = open_source(str(tmp_path))
    model = source.skeleton()
    structure = find_structure(model)
    assert not in_memory(model)
    for block in reversed(structure.blocks):
        source.materialise([block])
    source.materialise(structure.outside)
    assert source.dtype == reference.dtype == dtype
    assert_same(model, reference)
    assert torch.equal(model(tokens).logits, reference(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_single_block_is_loaded_and_released(family: str, tmp_path: Path) -> None:
    source = open_source(str(save_tiny(family, tmp_path)))
    model = source.skeleton()
    block = find_structure(model).blocks[1]
    source.materialise([block])
    own = {name for name in tensors_of(model) if name.startswith(block + ".")}
    assert own
    assert in_memory(model) == own
    first = {name: tensors_of(model)[name].clone() for name in own}
    source.release([block])
    assert not in_memory(model)
    source.materialise([block])
    assert all(torch.equal(tensors_of(model)[name], value) for name, value in first.items())


def test_prefix_is_a_whole_name(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=32, n_embd=8, n_head=2, n_layer=12, n_positions=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    source.materialise(["transformer.h.1"])
    assert {name.split(".")[2] for name in in_memory(source.skeleton())} == {"1"}


def test_tensors_in_memory_are_not_read_again(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("llama", tmp_path)))
    source.materialise(["model.layers.0"])
    weight = source.skeleton().get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.zero_()
    source.materialise(["model.layers"])
    assert source.skeleton().get_parameter("model.layers.0.mlp.up_proj.weight") is weight
    assert not weight.any()
    assert source.skeleton().get_parameter("model.layers.1.mlp.up_proj.weight").any()


@pytest.mark.parametrize("prefix", ["model.embed_tokens", "lm_head"])
def test_tied_weights_are_one_parameter_under_either_name(prefix: str, tmp_path: Path) -> None:
    source = open_source(str(save_tiny("qwen2", tmp_path)))
    model = source.skeleton()
    source.materialise([prefix])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta
    source.release([prefix])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.is_meta


def test_tie_stored_only_under_the_name_of_the_head(tmp_path: Path, tokens: torch.Tensor) -> None:
    save_tiny("qwen2", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    source.materialise(["model", "lm_head"])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert source.skeleton().lm_head.weight is source.skeleton().model.embed_tokens.weight
    assert torch.equal(source.skeleton()(tokens).logits, reference(tokens).logits)


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_stored_twice_stay_tied_only_if_equal(equal: bool, tmp_path: Path, tokens: torch.Tensor) -> None:
    save_tiny("qwen2", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    if not equal:
        stored["lm_head.weight"][-1, -1] += 1
    save_file(stored, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    model = source.skeleton()
    source.materialise([""])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == equal
    assert source.config.tie_word_embeddings == equal
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(tokens).logits, reference(tokens).logits)


def test_experts_stored_one_by_one_are_fused_per_block(tmp_path: Path) -> None:
    """transformers' own weight conversions join many stored tensors into one parameter, for this block alone. The
    skeleton has them split again."""
    config = AutoConfig.for_model(
        "mixtral", vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="20KB")
    stored = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in stored
    source = open_source(str(tmp_path))
    model = source.skeleton()
    source.materialise(["model.layers.1"])
    assert all(name.startswith("model.layers.1.") for name in in_memory(model))
    source.materialise([""])
    join_experts(model)
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_one_stored_tensor_for_two_parameters_leaves_the_other_unloaded(tmp_path: Path) -> None:
    """A tensor that is split on loading also fills parameters outside the prefix. Those are released again."""
    from transformers.core_model_loading import Chunk, WeightConverter

    from shiftadd_cli.source.loading import Loader
    from shiftadd_cli.source.safetensors_folder import SafetensorsFolder
    from shiftadd_cli.source.skeleton import build_skeleton

    save_tiny("llama", tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for i in range(2):
        pair = [stored.pop(f"model.layers.{i}.mlp.{kind}_proj.weight") for kind in ("gate", "up")]
        stored[f"model.layers.{i}.mlp.both.weight"] = torch.cat(pair)
    save_file(stored, tmp_path / "model.safetensors")

    class Split(SafetensorsFolder):
        def loader(self, model: PreTrainedModel, dtype: torch.dtype) -> tuple[list[object], object]:
            return [WeightConverter("mlp.both", ["mlp.gate_proj", "mlp.up_proj"], [Chunk(dim=0)])], None

    model = build_skeleton(type(reference), reference.config, torch.float32)
    loader = Loader(model, Split(tmp_path), torch.float32, "here")
    loader.materialise(["model.layers.0.mlp.up_proj"])
    assert in_memory(model) == {"model.layers.0.mlp.up_proj.weight"}
    loader.materialise([""])
    assert_same(model, reference)


def test_loading_needs_no_gradients_and_leaves_the_environment_alone(tmp_path: Path) -> None:
    before = dict(os.environ), logging.is_progress_bar_enabled()
    source = open_source(str(save_tiny("llama", tmp_path)))
    source.materialise([""])
    assert (dict(os.environ), logging.is_progress_bar_enabled()) == before
    assert not any(parameter.requires_grad for parameter in source.skeleton().parameters())


@pytest.mark.parametrize("name", ["model.safetensors", "tiny.gguf"])
@pytest.mark.parametrize("remaining", [None, 3000])
def test_files_that_change_after_opening_are_reported(remaining: int | None, name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name == "tiny.gguf":
        save_tiny_gguf(file)
        source = open_source(str(file))
    else:
        source = open_source(str(save_tiny("llama", tmp_path)))
    content = file.read_bytes()
    file.unlink()
    if remaining is not None:
        file.write_bytes(content[:remaining])
    with pytest.raises(SourceError, match=r"could not be (read|loaded)"):
        source.materialise(["model.layers.0"])
