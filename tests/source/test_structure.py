"""The structure of each architecture against its known layers, and the refusals."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import Structure, find_structure
from shiftadd_cli.source.linear import linear_sizes

_GATED = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
EXPECTED = {
    "llama": ("model.layers", _GATED),
    "mistral": ("model.layers", _GATED),
    "qwen2": ("model.layers", _GATED),
    "qwen3": ("model.layers", _GATED),
    "gemma3": ("model.layers", _GATED),
    "phi": ("model.layers", {*(f"self_attn.{x}_proj" for x in "qkv"), "self_attn.dense", "mlp.fc1", "mlp.fc2"}),
    "opt": ("model.decoder.layers", {*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "fc1", "fc2"}),
    "gpt2": ("transformer.h", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    "bloom": (
        "transformer.h",
        {"self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    ),
}


def _on_meta(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_linears_of_each_family(family: str) -> None:
    model = _on_meta(family)
    structure = find_structure(model)
    block_list, kinds = EXPECTED[family]
    depth = model.config.num_hidden_layers
    assert structure.block_list == block_list
    assert structure.blocks == tuple(f"{block_list}.{i}" for i in range(depth))
    assert {(linear.block, linear.kind) for linear in structure.linears} == {
        (i, kind) for i in range(depth) for kind in kinds
    }
    assert all(linear.name == f"{structure.blocks[linear.block]}.{linear.kind}" for linear in structure.linears)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_match_the_computation(family: str) -> None:
    model = tiny_model(family)
    for linear in find_structure(model).linears:
        module = model.get_submodule(linear.name)
        assert module(torch.zeros(1, linear.in_features)).shape == (1, linear.out_features)
        shape = (
            (linear.in_features, linear.out_features)
            if linear.transposed
            else (linear.out_features, linear.in_features)
        )
        assert tuple(model.get_parameter(f"{linear.name}.weight").shape) == shape
        assert linear.transposed == isinstance(module, Conv1D) == (family == "gpt2")
        assert linear.has_bias == ("bias" in dict(module.named_parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_accounted_for(family: str) -> None:
    model = _on_meta(family)
    structure = find_structure(model)
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    assert owners == {linear.name for linear in structure.linears} | {name for name, _ in structure.kept}
    reasons = dict(structure.kept)
    assert reasons[next(n for n, m in model.named_modules() if m is model.get_input_embeddings())] == "embedding"
    assert reasons["lm_head"] == "output head"
    for name, reason in structure.kept:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            assert reason in ("output head", "outside the blocks")


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_and_blocks_cover_every_tensor_once(family: str) -> None:
    model = _on_meta(family)
    structure = find_structure(model)
    tensors = [n for n, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]
    for name in tensors:
        covers = [p for p in (*structure.outside, *structure.blocks) if name == p or name.startswith(p + ".")]
        assert len(covers) == 1, (name, covers)


def test_tied_groups_are_reported() -> None:
    assert find_structure(_on_meta("llama")).tied == ()
    assert [set(group) for group in find_structure(_on_meta("qwen2")).tied] == [
        {"model.embed_tokens.weight", "lm_head.weight"}
    ]


def _kinds(structure: Structure, block: int) -> set[str]:
    return {linear.kind for linear in structure.linears if linear.block == block}


def test_skip_covers_modules_and_everything_below_them() -> None:
    structure = find_structure(_on_meta("llama"), skip=["*.down_proj", "model.layers.0.self_attn"])
    assert _kinds(structure, 0) == {"mlp.gate_proj", "mlp.up_proj"}
    assert _kinds(structure, 1) == EXPECTED["llama"][1] - {"mlp.down_proj"}
    reasons = dict(structure.kept)
    assert reasons["model.layers.1.mlp.down_proj"] == "skipped by *.down_proj"
    assert reasons["model.layers.0.self_attn.q_proj"] == "skipped by model.layers.0.self_attn"


def test_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(SourceError, match=r"'\*\.downproj' matches no module"):
        find_structure(_on_meta("llama"), skip=["*.downproj"])


def test_skipping_everything_is_refused() -> None:
    with pytest.raises(SourceError, match="skip fewer"):
        find_structure(_on_meta("llama"), skip=["model.layers.*"])


def _mixture() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_fused_experts_are_refused_by_name_unless_skipped() -> None:
    with pytest.raises(SourceError, match=r"Only \d+% .*model\.layers\.0\.mlp\.experts.*`allow_partial=True`"):
        find_structure(_mixture())
    structure = find_structure(_mixture(), skip=["*.experts"])
    assert _kinds(structure, 0) >= {"self_attn.q_proj"}
    assert dict(structure.kept)["model.layers.1.mlp.experts"] == "skipped by *.experts"


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(3)])
        self.scale = nn.Parameter(torch.ones(width))


class _Toy(nn.Module):
    """Nested lists, a smaller list beside the blocks, and tensors directly on the path to the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(3))
        self.side = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.body = nn.Module()
        self.body.register_buffer("table", torch.zeros(2))
        self.body.steps = nn.ModuleList([_Block(8), _Block(8)])


def test_outer_list_wins_and_loose_tensors_are_outside() -> None:
    structure = find_structure(_Toy())
    assert structure.blocks == ("body.steps.0", "body.steps.1")
    assert _kinds(structure, 1) == {"inner.0", "inner.1", "inner.2"}
    assert set(structure.outside) == {"start", "side", "body.table"}
    assert dict(structure.kept)["body.steps.0"] == "not a linear layer"


class _Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class _Apart(nn.Linear):
    """Computes what any linear does, but adds the bias separately, as Falcon's does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


def test_linear_with_its_own_forward_is_left_alone_unless_it_computes_the_same() -> None:
    model = nn.Module()
    model.steps = nn.ModuleList(
        [nn.Sequential(nn.Linear(4, 4), _Scaled(4, 4), _Apart(4, 6), _Apart(6, 4, bias=False)) for _ in range(2)]
    )
    structure = find_structure(model.to("meta"))
    assert _kinds(structure, 0) == {"0", "2", "3"}
    assert dict(structure.kept)["steps.0.1"] == "not a linear layer"
    assert structure.share == (16 + 24 + 24) / (16 + 16 + 24 + 24)


def test_checking_a_linear_leaves_it_unchanged() -> None:
    module = _Apart(4, 6)
    weight = module.weight
    assert linear_sizes(module) == (6, 4, False)
    assert module.weight is weight
    assert (module.in_features, module.out_features) == (4, 6)


def test_elements_of_different_kinds_are_blocks() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.ReLU(), nn.Linear(4, 8))])
    structure = find_structure(model)
    assert structure.blocks == ("layers.0", "layers.1")
    assert [linear.kind for linear in structure.linears] == ["0", "1"]


def test_small_part_of_a_model_is_compressed_if_allowed() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), _Scaled(4, 8)) for _ in range(2)])
    with pytest.raises(SourceError, match=r"Only 33% .*layers\.0\.1, a _Scaled, not a linear.*`allow_partial=True`"):
        find_structure(model)
    assert find_structure(model, allow_partial=True).share == 1 / 3
    # Skipping modules by name counts as permission.
    assert find_structure(model, skip=["layers.*.1"]).share == 1


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(SourceError, match="Sequential has no blocks"):
        find_structure(nn.Sequential(nn.Linear(4, 4)))
