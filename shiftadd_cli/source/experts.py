"""Experts of a mixture as individual linear layers; transformers keeps the experts of a layer in stacks of matrices.

transformers states the form of a class of experts when it wraps it (`transformers.integrations.moe`): the layout of a
stack (gate and up as two halves or in alternating rows; transposed; with biases) and how gate and up form the input of
the last projection. A class that states nothing may still compute the same as `PaddedExperts`, which is tested on a
small twin. So no family is known by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# The names of stacks in transformers, each with its projections.
_GATED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_PLAIN = {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}
# Names in configurations for the number of experts per token.
_SENT_TO = ("num_experts_per_tok", "moe_topk", "top_k_experts")


@dataclass(frozen=True)
class _Form:
    """The layout of experts in stacks and how gate and up are joined, for classes that do not state it."""

    act_fn: Any
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = True
    is_concatenated: bool = True

    def _apply_gate(self, both: Tensor) -> Any:
        gate, up = both.chunk(2, -1)
        return self.act_fn(gate) * up


class Expert(nn.Module):
    """The linears of one expert: `gate_proj` (if gated), `up_proj` and `down_proj`."""


class SplitExperts(nn.Module):
    """Replaces a transformers module that keeps its experts in stacks, and computes the same.

    The experts are the children `0`, `1`, ... The original module keeps no weights of its own and is not a child. It
    joins gate and up, and takes the weights back when stacks are needed again (`joined`).
    """

    _stacked: nn.Module
    _form: Any

    def __init__(self, stacked: nn.Module, form: Any = None) -> None:
        """stacked: see `can_split`; it loses its parameters. The linears get its device and dtype. form: the layout of
        its experts, by default as its class states it."""
        super().__init__()
        # Not as a child, because transformers would look for the stacks in it.
        object.__setattr__(self, "_stacked", stacked)
        object.__setattr__(self, "_form", stacked if form is None else form)
        self._stacks = _stacks(self._form)
        self._shapes = {name: (tuple(stack.shape), stack.dtype) for name, stack in stacked.named_parameters()}
        self.num_experts = int(next(iter(self._shapes.values()))[0][0])
        for index in range(self.num_experts):
            self.add_module(str(index), Expert())
        for name, leaves in self._stacks.items():
            weight, bias = getattr(stacked, name), getattr(stacked, f"{name}_bias", None)
            for index, expert in enumerate(self.experts()):
                biases = [None] * len(leaves) if bias is None else self._cut(name, bias[index], turn=False)
                for leaf, matrix, vector in zip(leaves, self._cut(name, weight[index]), biases, strict=True):
                    expert.add_module(leaf, _linear(matrix, vector))
            for parameter in (name, f"{name}_bias"):
                # The stack is dropped before the next one is cut, so that not all exist twice.
                stacked._parameters.pop(parameter, None)

    def experts(self) -> Iterator[Expert]:
        """The experts in order."""
        for index in range(self.num_experts):
            expert = self._modules[str(index)]
            assert isinstance(expert, Expert), "numbered children are experts"
            yield expert

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum over the experts of each token.

        hidden_states `[tokens, in]`; top_k_index int64 `[tokens, k]`, the experts of a token (`num_experts` or above
        means none); top_k_weights `[tokens, k]`. Returns `[tokens, out]` in the dtype of the hidden states.
        """
        if hidden_states.is_meta:
            # Without values there is no routing; one expert is enough for the shape.
            expert: Any = self._modules["0"]
            return expert.down_proj(self._inner(expert, hidden_states))
        # A half-precision sum would be rounded after every expert.
        total: Tensor | None = None
        for index in top_k_index.unique().tolist():
            if index >= self.num_experts:
                continue
            tokens, slots = torch.where(top_k_index == index)
            expert = self._modules[str(index)]
            output = expert.down_proj(self._inner(expert, hidden_states[tokens]))
            weighted = output * top_k_weights[tokens, slots, None]
            if total is None:
                kind = torch.promote_types(weighted.dtype, torch.float32)
                total = weighted.new_zeros(len(hidden_states), weighted.shape[-1], dtype=kind)
            total.index_add_(0, tokens, weighted.to(total.dtype))
        return torch.zeros_like(hidden_states) if total is None else total.to(hidden_states.dtype)

    def routing(self, hidden_states: Tensor, top_k_index: Tensor, *_: Any) -> Tensor:
        """The experts of each token, int64 `[tokens, k]`, from the arguments of a call."""
        return top_k_index

    def joined(self) -> nn.Module:
        """The original module, with its weights in stacks again; this one keeps none."""
        stacked = self._stacked
        for name, stack in self.joined_stacks():
            stacked.register_parameter(name, _frozen(stack))
        return stacked

    def joined_stacks(self) -> Iterator[tuple[str, Tensor]]:
        """The weights in stacks, by name; this module drops each stack before it yields the next."""
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
        return any(weight.is_meta for expert in self.experts() for weight in expert.parameters())

    @contextmanager
    def as_stacks(self) -> Iterator[None]:
        """Show empty stacks, under the names that transformers knows. Weights loaded into them go to the experts that
        have none."""
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
        """The projections of one expert in a stack, each `[out, in]`, or each `[out]` in a stack of biases."""
        if turn and self._form.is_transposed:
            matrices = matrices.T
        if len(self._stacks[name]) == 1:
            return [matrices]
        return matrices.chunk(2) if self._form.is_concatenated else (matrices[::2], matrices[1::2])


class PaddedExperts(SplitExperts):
    """The same for experts that each get all tokens, with zeros for tokens routed elsewhere (Llama 4)."""

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
        """The experts of each token, int64 `[tokens, experts]`; the value `num_experts` means none."""
        active = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1]).any(-1).T
        numbers = torch.arange(self.num_experts, device=active.device)
        return torch.where(active, numbers, self.num_experts)


def can_split(module: Any) -> bool:
    """Whether the module holds experts in stacks of a known form, and nothing else."""
    return _says_form(module) or _is_padded(module)


def _is_padded(module: Any) -> bool:
    """Whether the module computes the same as `PaddedExperts`; tested on a twin of two experts."""
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
            actual = PaddedExperts(twin, _Form(act_fn))(states)
    except Exception:  # a different computation may fail in any way on these sizes
        return False
    return (
        isinstance(expected, Tensor) and expected.shape == actual.shape and torch.allclose(expected, actual, atol=1e-5)
    )


def _says_form(module: Any) -> bool:
    flags = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
    if not all(type(getattr(module, name, None)) is bool for name in flags) or module.has_post_expert_norm:
        return False
    parameters = dict(module.named_parameters())
    expected = set(_stacks(module))
    if module.has_bias:
        expected |= {f"{name}_bias" for name in expected}
    if parameters.keys() != expected or any(True for _ in module.buffers()):
        return False
    stacks = {name: parameters[name] for name in _stacks(module)}
    if any(stack.ndim != 3 for stack in stacks.values()):
        return False
    *_, (experts, outer, inner) = (one.mT.shape if module.is_transposed else one.shape for one in stacks.values())
    first = next(iter(stacks.values()))
    rows, columns = (first.mT if module.is_transposed else first).shape[1:]
    return (len(first), rows) == (experts, inner * (1 + module.has_gate)) and columns == outer


def split_experts(model: nn.Module) -> dict[str, SplitExperts]:
    """Replace every module of `model` that `can_split` by `SplitExperts`; returns these by name."""
    experts = {}
    for name, module in list(model.named_modules()):
        if can_split(module):
            experts[name] = SplitExperts(module) if _says_form(module) else PaddedExperts(module, _Form(module.act_fn))
            model.set_submodule(name, experts[name])
    return experts


def tokens_of(index: Tensor, expert: int) -> Tensor:
    """Numbers of the tokens routed to an expert, in the order of its input rows: int64, ascending.

    index: int64 `[tokens, k]`, the `top_k_index` of `SplitExperts`.
    """
    return torch.where(index == expert)[0]


def place_in_mixture(block: nn.Module, path: str) -> tuple[str, int] | None:
    """The path of the split experts that contain the module `path` of a block, and the expert's number."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        if isinstance(block.get_submodule(".".join(parts[:end])), SplitExperts):
            return ".".join(parts[:end]), int(parts[end])
    return None


def routed_shares(model: Any) -> dict[str, float]:
    """The average share of the tokens that an expert reads, by name of the split experts; 1 if the configuration does
    not give the number of experts per token."""
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in _SENT_TO)
    per_token = next((count for count in named if isinstance(count, int)), None)
    return {
        name: 1.0 if per_token is None else min(1.0, per_token / module.num_experts)
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
    """The stack that a parameter belongs to, and the linears' parameter it holds (`weight` or `bias`)."""
    return (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = _frozen(weight.detach())
    if bias is not None:
        linear.bias = _frozen(bias.detach())
    return linear
