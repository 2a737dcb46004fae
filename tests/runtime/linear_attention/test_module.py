"""Linear attention inside models of transformers: generation, batches, refusals."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from linear_attention import filled_map
from tiny_models import tiny_model
from torch import Tensor
from transformers import DynamicCache, StaticCache

from shiftadd_cli.errors import LinearAttentionError
from shiftadd_cli.runtime.linear_attention.attention import Reach
from shiftadd_cli.runtime.linear_attention.cache_layer import LinearLayer
from shiftadd_cli.runtime.linear_attention.module import heads_of, is_attention, linearize

REACH = Reach(window=6, sinks=2)


def attentions(model: Any) -> list[Any]:
    return [module for module in model.modules() if is_attention(module)]


def linear_model(family: str, layers: tuple[int, ...] = (0,), name: str = "exp", reach: Reach = REACH) -> Any:
    """A tiny model with linear attention in these layers, in float32."""
    model = tiny_model(family).eval()
    for module in attentions(model):
        if module.layer_idx in layers:
            linearize(module, filled_map(name, heads_of(module), seed=module.layer_idx), reach)
    return model


def tokens_of(rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (rows, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi"])
@torch.no_grad()
def test_a_cache_gives_the_logits_of_one_pass(family: str) -> None:
    model = linear_model(family, (0, 1))
    ids = tokens_of(2, 150)
    expected = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([70, 9, *[1] * 71], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(cache.layers[0], LinearLayer)
    assert cache.get_seq_length() == 150


@torch.no_grad()
def test_a_wide_window_changes_nothing() -> None:
    ids = tokens_of(2, 100)
    linear = linear_model("llama", (0, 1), reach=Reach(window=100, sinks=0))
    torch.testing.assert_close(linear(ids).logits, tiny_model("llama").eval()(ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_full_layer_among_sliding_ones() -> None:
    model = linear_model("gemma3", (1,))
    ids = tokens_of(1, 120)
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([60, *[1] * 60], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_padded_batches_generate_the_texts_of_single_prompts(beams: int) -> None:
    model = linear_model("llama", (0, 1))
    short, long = tokens_of(1, 20, 1), tokens_of(1, 90, 2)
    settings = {"max_new_tokens": 40, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    padded = torch.cat([torch.cat([torch.zeros(1, 70, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(padded)
    mask[0, :70] = 0
    together = model.generate(padded, attention_mask=mask, **settings)[:, 90:]
    for row, prompt in enumerate((short, long)):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert alone[0, prompt.shape[1] :].tolist() == together[row].tolist()


@torch.no_grad()
def test_copies_and_files_of_a_model_are_whole() -> None:
    model = linear_model("llama")
    ids = tokens_of(1, 50)
    expected = model(ids).logits
    copied = copy.deepcopy(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    read = torch.load(stored, weights_only=False)
    assert torch.equal(read(ids).logits, expected)
    for parameter in copied.parameters():
        parameter.zero_()
    assert torch.equal(model(ids).logits, expected)


def test_other_caches_are_refused() -> None:
    model = linear_model("llama")
    with pytest.raises(LinearAttentionError, match="DynamicCache"):
        model(tokens_of(1, 4), past_key_values=StaticCache(config=model.config, max_cache_len=8))
    filled = DynamicCache()
    tiny_model("llama")(tokens_of(1, 4), past_key_values=filled)
    with pytest.raises(LinearAttentionError, match="empty cache"):
        model(tokens_of(1, 1), past_key_values=filled)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("mistral", "does not keep all tokens"), ("llama4", "does not keep all tokens"), ("gemma4", "does not keep all")],
)
def test_layers_without_all_tokens_are_refused(family: str, reason: str) -> None:
    module = attentions(tiny_model(family))[0]
    with pytest.raises(LinearAttentionError, match=reason):
        linearize(module, filled_map("exp", heads_of(module)), REACH)


def test_shared_keys_are_refused() -> None:
    module = next(module for module in attentions(tiny_model("gemma4")) if module.layer_idx == 1)
    with pytest.raises(LinearAttentionError, match="shares keys"):
        linearize(module, filled_map("exp", heads_of(module)), REACH)


def test_attention_without_the_standard_projections_is_refused() -> None:
    with pytest.raises(LinearAttentionError, match="standard way"):
        heads_of(attentions(tiny_model("deepseek_v3"))[0])


def test_texts_that_share_a_row_are_refused() -> None:
    model = linear_model("llama")
    packed = torch.tensor([[*range(20), *range(20)]])
    with pytest.raises(LinearAttentionError, match="packed texts"):
        model(tokens_of(1, 40), position_ids=packed, use_cache=False)


@torch.no_grad()
def test_packed_texts_without_a_mask_are_refused() -> None:
    model = linear_model("llama")
    with pytest.raises(LinearAttentionError, match="uses `cu_seq_lens_q` in its attention"):
        model(tokens_of(1, 40), cu_seq_lens_q=torch.tensor([0, 20, 40]), use_cache=False)
