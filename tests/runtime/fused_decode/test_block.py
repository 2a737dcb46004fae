"""Decoder blocks computed by the kernels, compared with those of transformers token by token."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import Checkpoint
from compiled import needs_kernels, on_threads
from decoding import decode, decode_in_parts, write_decoders
from loading import IDS, assert_close, assert_same_state, load
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from shiftadd_cli.runtime.fused_decode.block import LookupBlock, fuse_blocks, part_blocks
from shiftadd_cli.runtime.fused_decode.block_plan import BlockPlan
from shiftadd_cli.runtime.fused_decode.stack_plan import StackPlan

pytestmark = needs_kernels
FUSED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "gemma3")
OTHERS = ("phi", "gpt2")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return write_decoders((*FUSED, *OTHERS), tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[BlockPlan]:
    """A plan for every block that the kernels computed, alone or with the others of its model."""
    plans: list[BlockPlan] = []
    rest, decode_all = BlockPlan.rest, StackPlan.decode

    def counted(self: BlockPlan, *tensors: Tensor) -> Tensor:
        plans.append(self)
        return rest(self, *tensors)

    def all_counted(self: StackPlan, *arguments: Any) -> Tensor:
        plans.extend(self.plans)
        return decode_all(self, *arguments)

    monkeypatch.setattr(BlockPlan, "rest", counted)
    monkeypatch.setattr(StackPlan, "decode", all_counted)
    return plans


def in_dtype(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    """`model.to(dtype)`, which transformers decorates in a way that mypy does not understand."""
    return model.to(dtype)


def generate(model: Any) -> Tensor:
    return model.generate(IDS, max_new_tokens=20, do_sample=False, eos_token_id=None)


def parted(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    part_blocks(model)
    assert not any(isinstance(module, LookupBlock) for module in model.modules())
    return model


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_logits_are_those_of_the_dense_model(
    checkpoints: dict[str, Checkpoint], family: str, rows: int, calls: list[BlockPlan]
) -> None:
    folder, dense = checkpoints[family]
    model = load(folder)
    logits = decode(model, rows)
    assert len(calls) == 6 * model.config.num_hidden_layers
    assert_close(logits, decode(dense, rows), 1e-4)
    assert_close(logits, decode(parted(model), rows), 1e-5)


@pytest.mark.parametrize("family", FUSED)
def test_bfloat16_error_is_at_most_about_that_of_the_dense_model(
    checkpoints: dict[str, Checkpoint], family: str, calls: list[BlockPlan]
) -> None:
    folder, dense = checkpoints[family]
    exact, rounded = decode(dense, 2, 20), decode(in_dtype(copy.deepcopy(dense), torch.bfloat16), 2, 20)
    logits = decode(load(folder, dtype=torch.bfloat16), 2, 20)
    assert calls
    assert (logits - exact).norm() <= 1.1 * (rounded - exact).norm()


def test_logits_match_without_a_cache_and_beyond_a_sliding_window(
    checkpoints: dict[str, Checkpoint], calls: list[BlockPlan]
) -> None:
    folder, dense = checkpoints["mistral"]
    model = load(folder)
    with torch.no_grad():
        assert_close(model(IDS[:, :1], use_cache=False).logits, dense(IDS[:, :1], use_cache=False).logits)
    assert len(calls) == model.config.num_hidden_layers
    tokens = model.config.sliding_window + 6
    assert_close(decode(model, 2, tokens), decode(dense, 2, tokens))


@pytest.mark.parametrize("family", FUSED)
def test_several_tokens_at_once(checkpoints: dict[str, Checkpoint], family: str, calls: list[BlockPlan]) -> None:
    folder, dense = checkpoints[family]
    model = load(folder)
    parts = [3, 8, 1, 2, 4]
    logits = decode_in_parts(model, parts)
    assert len(calls) >= 2 * model.config.num_hidden_layers
    # Beyond a sliding window, torch's own attention takes them.
    assert_close(logits, decode_in_parts(dense, parts), 1e-4)


def test_tokens_that_do_not_see_all_before_them(checkpoints: dict[str, Checkpoint], calls: list[BlockPlan]) -> None:
    folder, dense = checkpoints["llama"]
    seen = torch.ones(1, 1, 4, 12, dtype=torch.bool).tril(8)
    masks = [seen.clone() for _ in range(3)]
    masks[0][..., 2] = False
    masks[1][..., 0, 9] = True
    masks[2][..., 3, :6] = False
    model = load(folder)

    def logits(one: PreTrainedModel, cache: Cache, begin: Tensor | None, mask: Tensor) -> Tensor:
        with torch.no_grad():
            one(IDS[:1, :8], past_key_values=cache, attention_mask=begin)
            return one(IDS[1:2, :4], past_key_values=cache, attention_mask=mask).logits

    def made(one: PreTrainedModel) -> Iterator[Cache]:
        yield DynamicCache(config=one.config)
        yield StaticCache(config=one.config, max_cache_len=20)

    for mask in (*masks, torch.where(masks[2], 0.0, -torch.inf)):
        fused, expected = (logits(one, DynamicCache(config=one.config), None, mask) for one in (model, dense))
        assert_close(fused, expected, 1e-4)
    # Padding before the prompt, and a cache that holds its room beside the tokens.
    padding = torch.tensor([[0, 0, 0, *[1] * 9]])
    for one_cache, other_cache in zip(made(model), made(dense), strict=True):
        fused = logits(model, one_cache, padding[:, :8], padding)
        assert_close(fused, logits(dense, other_cache, padding[:, :8], padding), 1e-4)
    assert not calls


def test_number_of_threads_changes_no_bit(checkpoints: dict[str, Checkpoint]) -> None:
    model = load(checkpoints["llama"].folder)
    logits = on_threads((1, 2, 4), lambda: decode(model, 2))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("family", [*FUSED, *OTHERS])
def test_generated_text_is_the_same(checkpoints: dict[str, Checkpoint], family: str) -> None:
    model = load(checkpoints[family].folder)
    assert torch.equal(generate(model), generate(parted(model)))


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_keep_their_blocks(checkpoints: dict[str, Checkpoint], family: str) -> None:
    model = load(checkpoints[family].folder)
    assert not any(isinstance(module, LookupBlock) for module in model.modules())


def _hook_inside(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, inputs, output: output + 1)


def _hook_before(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def _other_module(model: PreTrainedModel) -> None:
    old = model.model.layers[1].self_attn.o_proj
    model.model.layers[1].self_attn.o_proj = nn.Sequential(old, nn.Tanh())


def _other_bias(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.add_(1)


def _other_norm(model: PreTrainedModel) -> None:
    model.model.layers[0].input_layernorm.weight.data = model.model.layers[0].input_layernorm.weight.data * 3


class _Norm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.get_parameter("weight"), norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def _other_norm_class(model: PreTrainedModel) -> None:
    model.model.layers[0].post_attention_layernorm = _Norm(model.model.layers[0].post_attention_layernorm)


def _new_parameters(model: PreTrainedModel) -> None:
    block = model.model.layers[1]
    block.self_attn.k_proj.bias = nn.Parameter(torch.ones_like(block.self_attn.k_proj.bias))
    block.post_attention_layernorm.weight = nn.Parameter(torch.full_like(block.post_attention_layernorm.weight, 2))


def _other_attention(model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")


def _other_type(model: PreTrainedModel) -> None:
    model.double()


@pytest.mark.parametrize(
    "change",
    [
        _hook_inside,
        _hook_before,
        _other_module,
        _other_bias,
        _other_norm,
        _other_norm_class,
        _new_parameters,
        _other_attention,
        _other_type,
    ],
)
def test_changes_after_the_first_token_take_effect(
    checkpoints: dict[str, Checkpoint], change: Callable[[PreTrainedModel], None]
) -> None:
    model = load(checkpoints["qwen2"].folder)
    plain = parted(model)
    before = decode(model)
    change(model)
    change(plain)
    after = decode(model)
    assert_close(after, decode(plain), 1e-5)
    if change not in (_other_attention, _other_type):
        assert (after - before).abs().max() > 1e-3


def test_moved_and_copied_models_compute_with_their_own_tensors(
    checkpoints: dict[str, Checkpoint], calls: list[BlockPlan]
) -> None:
    model = load(checkpoints["llama"].folder)
    before = decode(model)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    in_dtype(in_dtype(model, torch.bfloat16), torch.float32)
    for duplicate in (twin, read):
        calls.clear()
        assert torch.equal(decode(duplicate), before)
        assert len(calls) == 6 * model.config.num_hidden_layers
    # Norms lost some digits in bfloat16.
    assert_close(decode(model), before, 0.05)
    assert_close(decode(model), decode(parted(model)), 1e-5)


def test_padding_static_caches_gradients_and_hidden_states_still_work(
    checkpoints: dict[str, Checkpoint], calls: list[BlockPlan]
) -> None:
    model = load(checkpoints["llama"].folder)
    plain = parted(model)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0

    def padded(decoder: PreTrainedModel, cache: object) -> Tensor:
        with torch.no_grad():
            decoder(IDS[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
            return decoder(IDS[:, 9:10], attention_mask=mask, past_key_values=cache).logits

    for kind in (DynamicCache, lambda config: StaticCache(config=config, max_cache_len=32)):
        one, other = (padded(decoder, kind(config=decoder.config)) for decoder in (model, plain))
        assert_close(one, other, 1e-5)
    # Attention over padding or empty positions needs a mask, which the kernels do not take.
    assert not calls
    loss = model(IDS[:, :1]).logits.square().mean()
    loss.backward()
    assert model.model.norm.weight.grad is not None
    assert not calls
    with torch.no_grad():
        states = [decoder(IDS[:, :1], output_hidden_states=True).hidden_states for decoder in (model, plain)]
    assert len(states[0]) == len(states[1]) == model.config.num_hidden_layers + 1
    for one, other in zip(*states, strict=True):
        assert_close(one, other, 1e-5)


def test_cache_that_returns_other_tensors_is_refused(checkpoints: dict[str, Checkpoint]) -> None:
    model = load(checkpoints["llama"].folder)

    class Odd(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
            return keys[:, :1], values[:, :1]

    with torch.no_grad(), pytest.raises(RuntimeError, match="The cache gives"):
        model(IDS[:, :1], past_key_values=Odd())


def test_compiled_model_is_one_graph_of_operators(checkpoints: dict[str, Checkpoint]) -> None:
    model = load(checkpoints["llama"].folder)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits, 1e-5)


def test_fusing_changes_neither_the_state_dict_nor_the_dense_model(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    model = load(checkpoints["qwen3"].folder)
    decode(model)
    assert_same_state(model, parted(model))
    dense = model.dequantize()
    assert not any(isinstance(module, LookupBlock) for module in dense.modules())
    fuse_blocks(dense)
    assert_close(decode(dense), decode(checkpoints["qwen3"].dense), 1e-4)


@pytest.mark.parametrize(
    ("family", "norm"), [("llama", "post_attention_layernorm"), ("olmo2", "post_feedforward_layernorm")]
)
def test_block_without_a_norm_of_its_family_gets_no_plan(
    checkpoints: dict[str, Checkpoint], family: str, norm: str
) -> None:
    block = load(checkpoints[family].folder).model.layers[0]
    assert isinstance(block, LookupBlock)
    assert block._find_plan() is not None
    delattr(block, norm)
    assert block._find_plan() is None
