"""Experts of a mixture as linear layers, one by one; transformers keeps those of a layer in stacks of matrices.

What it knows of a class of experts it says when it wraps it (`transformers.integrations.moe`): how a stack lies (both
halves of gate and up, or every other row; transposed; with biases) and how gate and up make the input of the last
projection. A class that says nothing may still compute what `PaddedExperts` does, which is tried on a small twin. So no
family is known by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# As transformers names stacks; each with the projections that lie in it.
_GATED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_PLAIN = {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}
# What configurations call the number of experts that a token is sent to.
_SENT_TO = ("num_experts_per_tok", "moe_topk", "top_k_experts")


@dataclass(frozen=True)
class _Form:
    """How experts lie in stacks and how gate and up are joined, for classes that do not say so themselves."""

    act_fn: Any
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = True
    is_concatenated: bool = True

    def _apply_gate(self, both: Tensor) -> Any:
        gate, up = both.chunk(2, -1)
        return self.act_fn(gate) * up


class Expert(nn.Module):
    """The linears of one expert: `gate_proj` (of gated ones), `up_proj` and `down_proj`."""


class SplitExperts(nn.Module):
    """Stands for a module of transformers that keeps its experts in stacks, and computes the same.

    Its experts are its children `0`, `1`, ... The module it was made from keeps no weights of its own and is no child:
    it is asked how gate and up are joined, and takes the weights back where stacks are wanted again (`joined`).
    """

    _stacked: nn.Module
    _form: Any

    def __init__(self, stacked: nn.Module, form: Any = None) -> None:
        """stacked: see `can_split`; it loses its parameters. Linears have their device and dtype. form: how its experts
        lie in it, by default what its class says."""
        super().__init__()
        # Not as a child: transformers would look for the stacks in it.
        object.__setattr__(self, "_stacked", stacked)
        object.__setattr__(self, "_form", stacked if form is None else form)
        self._stacks = _stacks(self._form)
        self._shapes = {name: (tuple(each.shape), each.dtype) for name, each in stacked.named_parameters()}
        self.num_experts = int(next(iter(self._shapes.values()))[0][0])
        for index in range(self.num_experts):
            self.add_module(str(index), Expert())
        for name, leaves in self._stacks.items():
            weight, bias = getattr(stacked, name), getattr(stacked, f"{name}_bias", None)
            for index, expert in enumerate(self.experts()):
                biases = [None] * len(leaves) if bias is None else self._cut(name, bias[index], turn=False)
                for leaf, matrix, vector in zip(leaves, self._cut(name, weight[index]), biases, strict=True):
                    expert.add_module(leaf, _linear(matrix, vector))
            for each in (name, f"{name}_bias"):
                # The stack goes before the next is cut, so that not all exist twice.
                stacked._parameters.pop(each, None)

    def experts(self) -> Iterator[Expert]:
        """In their order."""
        for index in range(self.num_experts):
            expert = self._modules[str(index)]
            assert isinstance(expert, Expert), "the children with numbers are"
            yield expert

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over its experts, for each token.

        hidden_states `[tokens, in]`; top_k_index int64 `[tokens, k]`, experts of a token (a number above all experts is
        none); top_k_weights `[tokens, k]`. Gives `[tokens, out]` in the dtype of the hidden states.
        """
        if hidden_states.is_meta:
            # Without values no token is sent to any expert; one of them shows the shape.
            expert: Any = self._modules["0"]
            return expert.down_proj(self._inner(expert, hidden_states))
        # Half-precision sums of several experts would be rounded at each.
        total: Tensor | None = None
        for index in top_k_index.unique().tolist():
            if index >= self.num_experts:
                continue
            tokens, places = torch.where(top_k_index == index)
            expert = self._modules[str(index)]
            output = expert.down_proj(self._inner(expert, hidden_states[tokens]))
            weighted = output * top_k_weights[tokens, places, None]
            if total is None:
                kind = torch.promote_types(weighted.dtype, torch.float32)
                total = weighted.new_zeros(len(hidden_states), weighted.shape[-1], dtype=kind)
            total.index_add_(0, tokens, weighted.to(total.dtype))
        return torch.zeros_like(hidden_states) if total is None else total.to(hidden_states.dtype)

    def routing(self, hidden_states: Tensor, top_k_index: Tensor, *_: Any) -> Tensor:
        """The experts of each token, int64 `[tokens, k]`, from the arguments of a call."""
        return top_k_index

    def joined(self) -> nn.Module:
        """The module it was made from, with its weights in stacks again; this one keeps none."""
        stacked = self._stacked
        for name, stack in self.joined_stacks():
            stacked.register_parameter(name, _frozen(stack))
        return stacked

    def joined_stacks(self) -> Iterator[tuple[str, Tensor]]:
        """Its weights in stacks, by name; what was given is gone here when the next is asked for."""
        for name, (shape, _) in self._shapes.items():
            yield name, self._joined(name, shape)
            self._empty(name)

    @property
    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the stacks, by name."""
        return self._shapes

    @property
    def is_empty(self) -> bool:
        """Whether any weight is on the meta device."""
        return any(each.is_meta for expert in self.experts() for each in expert.parameters())

    @contextmanager
    def as_stacks(self) -> Iterator[None]:
        """Be empty stacks, of the names that transformers knows; what they hold at the end goes to the experts, where
        these had nothing."""
        experts = {name: self._modules.pop(name) for name in [str(index) for index in range(self.num_experts)]}
        for name, (shape, dtype) in self._shapes.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, _frozen(empty))
        try:
            yield
        finally:
            stacks = {name: self._parameters.pop(name) for name in self._shapes}
            self._modules.update(experts)
            for name in self._shapes:
                stack = stacks.pop(name)
                assert stack is not None, "it was registered"
                self._fill(name, stack.detach())
                del stack

    def _fill(self, name: str, stack: Tensor) -> None:
        if stack.is_meta:
            return
        leaf, kind = _owner(name)
        for expert, matrices in zip(self.experts(), stack, strict=True):
            for module, value in zip(self._stacks[leaf], self._cut(leaf, matrices, turn=kind == "weight"), strict=True):
                linear = expert.get_submodule(module)
                if linear.get_parameter(kind).is_meta:
                    setattr(linear, kind, _frozen(value))

    def _empty(self, name: str) -> None:
        leaf, kind = _owner(name)
        for expert in self.experts():
            for module in self._stacks[leaf]:
                linear = expert.get_submodule(module)
                setattr(linear, kind, _frozen(linear.get_parameter(kind).detach().to("meta")))

    def _joined(self, name: str, shape: tuple[int, ...]) -> Tensor:
        leaf, kind = _owner(name)
        first = next(self.experts()).get_submodule(self._stacks[leaf][0]).get_parameter(kind)
        stack = torch.empty(shape, dtype=first.dtype, device=first.device)
        for expert, matrices in zip(self.experts(), stack, strict=True):
            parts = self._views(leaf, matrices, turn=kind == "weight")
            for module, part in zip(self._stacks[leaf], parts, strict=True):
                part.copy_(expert.get_submodule(module).get_parameter(kind).detach())
        return stack

    def _inner(self, expert: Any, states: Tensor) -> Any:
        if not self._form.has_gate:
            return self._form.act_fn(expert.up_proj(states))
        gate, up = expert.gate_proj(states), expert.up_proj(states)
        both = torch.cat((gate, up), -1) if self._form.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
        return self._form._apply_gate(both)

    def _cut(self, name: str, matrices: Tensor, *, turn: bool = True) -> list[Tensor]:
        return [view.clone(memory_format=torch.contiguous_format) for view in self._views(name, matrices, turn=turn)]

    def _views(self, name: str, matrices: Tensor, *, turn: bool) -> Sequence[Tensor]:
        """The projections of one expert in a stack, `[out, in]` each, or in one of biases, `[out]` each."""
        if turn and self._form.is_transposed:
            matrices = matrices.T
        if len(self._stacks[name]) == 1:
            return [matrices]
        return matrices.chunk(2) if self._form.is_concatenated else (matrices[::2], matrices[1::2])


class PaddedExperts(SplitExperts):
    """The same for experts that are each given all tokens, zeros in the place of those sent elsewhere (Llama 4)."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """`[experts * tokens, in]` → `[experts * tokens, out]`, expert after expert; zeros stay zeros."""
        states = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        if hidden_states.is_meta:
            first: Any = self._modules["0"]
            return first.down_proj(self._inner(first, hidden_states))
        output = torch.zeros_like(states)
        for index, own in enumerate(states):
            expert: Any = self._modules[str(index)]
            tokens = own.any(-1).nonzero().squeeze(-1)
            if len(tokens):
                output[index, tokens] = expert.down_proj(self._inner(expert, own[tokens]))
        return output.view(hidden_states.shape)

    def routing(self, hidden_states: Tensor, *_: Any) -> Tensor:
        """The experts of each token, int64 `[tokens, experts]`; `experts` stands for none."""
        active = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1]).any(-1).T
        numbers = torch.arange(self.num_experts, device=active.device)
        return torch.where(active, numbers, self.num_experts)


def can_split(module: Any) -> bool:
    """Whether the module keeps experts in stacks whose form is known, and nothing else."""
    return _says_form(module) or _is_padded(module)


def _is_padded(module: Any) -> bool:
    """Whether the module computes what `PaddedExperts` does; tried on a twin of two experts."""
    parameters, act_fn = dict(module.named_parameters()), getattr(module, "act_fn", None)
    if list(parameters) != ["gate_up_proj", "down_proj"] or act_fn is None or any(True for _ in module.buffers()):
        return False
    if any(stack.ndim != 3 for stack in parameters.values()):
        return False
    outer = parameters["down_proj"].shape[-1]
    if parameters["gate_up_proj"].shape[1] != outer:
        return False
    generator = torch.Generator().manual_seed(0)

    def stack(*shape: int) -> nn.Parameter:
        return _frozen(torch.randn(shape, generator=generator, device="cpu") / shape[1] ** 0.5)

    twin = copy.copy(module)
    twin._parameters = {"gate_up_proj": stack(2, outer, 6), "down_proj": stack(2, 3, outer)}
    states = torch.randn(8, outer, generator=generator, device="cpu")
    states[[1, 6]] = 0
    try:
        # Models are built under the meta device.
        with torch.no_grad(), torch.device("cpu"):
            expected = twin.forward(states)
            found = PaddedExperts(twin, _Form(act_fn))(states)
    except Exception:  # another computation may fail in any way on these sizes
        return False
    return isinstance(expected, Tensor) and expected.shape == found.shape and torch.allclose(expected, found, atol=1e-5)


def _says_form(module: Any) -> bool:
    said = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
    if not all(type(getattr(module, name, None)) is bool for name in said) or module.has_post_expert_norm:
        return False
    parameters = dict(module.named_parameters())
    expected = set(_stacks(module))
    if module.has_bias:
        expected |= {f"{name}_bias" for name in expected}
    if parameters.keys() != expected or any(True for _ in module.buffers()):
        return False
    stacks = {name: parameters[name] for name in _stacks(module)}
    if any(each.ndim != 3 for each in stacks.values()):
        return False
    *_, (experts, outer, inner) = (each.mT.shape if module.is_transposed else each.shape for each in stacks.values())
    first = next(iter(stacks.values()))
    rows, columns = (first.mT if module.is_transposed else first).shape[1:]
    return (len(first), rows) == (experts, inner * (1 + module.has_gate)) and columns == outer


def split_experts(model: nn.Module) -> dict[str, SplitExperts]:
    """Put `SplitExperts` in the place of every module of `model` that `can_split`; those, by name."""
    found = {}
    for name, module in list(model.named_modules()):
        if can_split(module):
            found[name] = SplitExperts(module) if _says_form(module) else PaddedExperts(module, _Form(module.act_fn))
            model.set_submodule(name, found[name])
    return found


def tokens_of(index: Tensor, expert: int) -> Tensor:
    """Numbers of the tokens that are sent to an expert, in the order of the rows that it reads: int64, ascending.

    index: int64 `[tokens, k]`, as `SplitExperts` is given it.
    """
    return torch.where(index == expert)[0]


def place_in_mixture(block: nn.Module, path: str) -> tuple[str, int] | None:
    """The path of the split experts that the module `path` of a block is in, and the number of its expert."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        if isinstance(block.get_submodule(".".join(parts[:end])), SplitExperts):
            return ".".join(parts[:end]), int(parts[end])
    return None


def routed_shares(model: Any) -> dict[str, float]:
    """The share of the tokens that an expert reads on average, by name of the split experts; 1 where the configuration
    does not say to how many a token is sent."""
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in _SENT_TO)
    sent = next((each for each in named if isinstance(each, int)), None)
    return {
        name: 1.0 if sent is None else min(1.0, sent / module.num_experts)
        for name, module in model.named_modules()
        if isinstance(module, SplitExperts)
    }


def has_split_experts(model: nn.Module) -> bool:
    """Whether `split_experts` changed the model."""
    return any(isinstance(module, SplitExperts) for module in model.modules())


def join_experts(model: nn.Module) -> None:
    """Undo `split_experts`, one module at a time."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitExperts):
            model.set_submodule(name, module.joined())


def _stacks(module: Any) -> Mapping[str, tuple[str, ...]]:
    return _GATED if module.has_gate else _PLAIN


def _owner(name: str) -> tuple[str, str]:
    """Of a parameter of stacks, the stack it belongs to, and what it holds of the linears in it."""
    return (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = _frozen(weight.detach())
    if bias is not None:
        linear.bias = _frozen(bias.detach())
    return linear
