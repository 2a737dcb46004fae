"""Split experts against transformers' own modules, and parts of a mixture in and out of memory."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MIXTURES, VOCAB_SIZE, save_tiny, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import find_structure, open_source
from shiftadd_cli.source.experts import (
    PaddedExperts,
    SplitExperts,
    can_split,
    has_split_experts,
    join_experts,
    split_experts,
)

TOKENS = torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("family", MIXTURES)
def test_split_model_matches_the_eager_experts_of_transformers(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    model.set_experts_implementation("eager")
    expected, state = logits(model), copy.deepcopy(model.state_dict())
    split = split_experts(model)
    assert split.keys() == {name for name, module in model.named_modules() if isinstance(module, SplitExperts)}
    assert len(split) == (1 if family == "deepseek_v3" else model.config.num_hidden_layers)
    assert not any(parameter.ndim == 3 for parameter in model.parameters())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)
    join_experts(model)
    assert not has_split_experts(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_half_precision_is_at_least_as_accurate_as_in_transformers(family: str) -> None:
    torch.manual_seed(0)
    model: Any = tiny_model(family)
    name = next(name for name, module in model.named_modules() if can_split(module))
    # All experts read every token. Their sum would be rounded after each expert.
    hidden, weights = torch.randn(64, 32), torch.rand(64, 4)
    index = torch.arange(4).expand(64, 4)
    exact = model.get_submodule(name)(hidden, index, weights)
    model.to(torch.bfloat16).set_experts_implementation("eager")
    arguments = (hidden.bfloat16(), index, weights.bfloat16())
    reference_error = (model.get_submodule(name)(*arguments).float() - exact).norm()
    output = split_experts(model)[name](*arguments)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() <= reference_error


def test_copies_and_pickles_compute_the_same() -> None:
    model = tiny_model("gpt_oss")
    split_experts(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        with torch.no_grad():
            twin.model.layers[0].mlp.experts.get_submodule("1.down_proj").bias.add_(1)
        assert not torch.equal(logits(twin), logits(model)), "it has weights of its own"


def test_tokens_sent_to_no_expert_add_nothing() -> None:
    experts = next(iter(split_experts(tiny_model("mixtral")).values()))
    hidden, index = torch.randn(3, 32), torch.tensor([[0, 4], [4, 4], [2, 0]])
    output = experts(hidden, index, torch.ones(3, 2))
    alone = experts(hidden[:1], index[:1, :1], torch.ones(1, 1))
    torch.testing.assert_close(output[:1], alone)
    assert not output[1].any()
    assert experts(hidden[1:2], index[1:2], torch.ones(1, 2)).shape == (1, 32)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_walking_the_parts_gives_the_whole_model(family: str, fused: bool, tmp_path: Path) -> None:
    """The files hold each expert separately, as transformers saves them, or stacks."""
    save_tiny(family, tmp_path, sharded=True)
    if fused:
        fused_model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
        fused_model._weight_conversions = []
        fused_model.save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    expected = logits(reference)
    split_experts(reference)
    source = open_source(str(tmp_path))
    model = source.skeleton()
    structure = find_structure(model)
    for block in structure.blocks:
        source.materialise([block])
        own = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
        assert own == {name for name, _ in model.named_parameters() if name.startswith(f"{block}.")}
        source.release([block])
        assert all(parameter.is_meta for parameter in model.parameters())
    source.materialise([*structure.outside, *structure.blocks])
    state = reference.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_loaded_experts_stay_when_one_is_requested_or_released(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("mixtral", tmp_path)))
    experts = source.skeleton().get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts, SplitExperts)
    source.materialise(["model.layers.0.mlp.experts.2"])
    assert not experts.is_empty
    with torch.no_grad():
        experts.get_parameter("1.up_proj.weight").fill_(1)
    source.release(["model.layers.0.mlp.experts.2"])
    source.materialise(["model.layers.0"])
    assert not experts.is_empty
    assert (experts.get_parameter("1.up_proj.weight") == 1).all()


@pytest.mark.parametrize("family", MIXTURES)
def test_structure_of_a_mixture(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    split = split_experts(model)
    structure = find_structure(model)
    last = max(linear.block for linear in structure.linears)
    expert_linears = [linear for linear in structure.linears if linear.block == last and linear.experts is not None]
    mixture = expert_linears[0].experts
    assert mixture is not None
    experts = next(reversed(split.values()))
    leaves = ("gate_proj", "up_proj", "down_proj")
    assert {linear.kind.removeprefix(f"{mixture}.") for linear in expert_linears} == {
        f"{index}.{leaf}" for index in range(experts.num_experts) for leaf in leaves
    }
    assert all(linear.has_bias == (family == "gpt_oss") for linear in expert_linears)
    others = {linear.kind for linear in structure.linears if linear.block == last and linear.experts is None}
    assert any(kind.startswith("self_attn.") for kind in others)
    routers = {name for name, reason in structure.kept if reason == "router"}
    block = structure.blocks[last]
    expected = {f"{block}.{mixture.rpartition('.')[0]}.{'router' if family in _ROUTERS else 'gate'}"}
    if family == "qwen2_moe":
        expected.add(f"{block}.mlp.shared_expert_gate")
        assert "mlp.shared_expert.up_proj" in others
    assert {name for name in routers if name.startswith(f"{block}.")} == expected


_ROUTERS = ("gpt_oss", "granitemoe")


def test_experts_that_read_every_token_are_split_and_compute_the_same(tmp_path: Path) -> None:
    """Llama 4 does not state the form of its stacks. Its experts read zeros for tokens that go elsewhere."""
    model = tiny_model("llama4")
    names = [name for name, module in model.named_modules() if can_split(module)]
    assert names
    experts = model.get_submodule(names[0])
    states = torch.randn(4 * 6, 32, generator=torch.Generator().manual_seed(0))
    states[torch.arange(24) % 3 != 0] = 0
    expected = experts(states)
    split = split_experts(model)[names[0]]
    assert isinstance(split, PaddedExperts)
    torch.testing.assert_close(split(states), expected)
    # The experts that read each token, by number. 4 stands for none.
    assert split.routing(states).tolist() == [
        [expert if (expert * 6 + token) % 3 == 0 else 4 for expert in range(4)] for token in range(6)
    ]
    inputs: list[torch.Tensor] = []
    split.get_submodule("2.gate_proj").register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    split(states)
    assert torch.equal(inputs[0], states[[12, 15]])
    join_experts(model)
    assert torch.equal(model.get_submodule(names[0])(states), expected)


def test_stacks_with_another_forward_are_left_alone() -> None:
    experts = tiny_model("llama4").model.layers[1].feed_forward.experts
    assert can_split(experts)
    compute = type(experts).forward
    other = type("Other", (type(experts),), {"forward": lambda self, states: 2 * compute(self, states)})
    experts.__class__ = other
    assert not can_split(experts)


def test_experts_without_stacks_of_three_axes_are_refused() -> None:
    """DBRX keeps the experts of a layer below each other in one matrix, so that only attention would be compressed."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("dbrx"))
    with pytest.raises(SourceError, match=r"experts\.mlp, a DbrxExpertGLU, not a linear layer.*`allow_partial=True`"):
        find_structure(model)


def test_experts_without_a_gate_are_split() -> None:
    """The experts of Nemotron-H. The rest of the model is not needed here."""
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = AutoConfig.for_model("nemotron_h", n_routed_experts=3, hidden_size=16, moe_intermediate_size=12)
    config._experts_implementation = "eager"
    model = nn.Module()
    model.experts = NemotronHExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    width = model.experts.up_proj.shape[2]
    arguments = (torch.randn(7, width, generator=generator), torch.randint(0, 3, (7, 1), generator=generator))
    with torch.no_grad():
        expected = model.experts(*arguments, torch.rand(7, 1, generator=torch.Generator().manual_seed(1)))
        split = split_experts(model)["experts"]
        output = split(*arguments, torch.rand(7, 1, generator=torch.Generator().manual_seed(1)))
    assert {name for name, _ in split.get_submodule("0").named_children()} == {"up_proj", "down_proj"}
    torch.testing.assert_close(output, expected)


class _Normed(nn.Module):
    """Declares that it normalises the output of each expert."""

    has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm = True, False, False, True, True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4))
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))


def test_stacks_are_split_only_if_their_stated_form_fits() -> None:
    module = _Normed()
    assert not can_split(module)
    module.has_post_expert_norm = False
    assert can_split(module)
    for name, value in (("is_transposed", True), ("has_bias", True), ("has_gate", False)):
        assert not can_split(type("_Other", (_Normed,), {"has_post_expert_norm": False, name: value})())
    module.scale = nn.Parameter(torch.ones(2))
    assert not can_split(module)
