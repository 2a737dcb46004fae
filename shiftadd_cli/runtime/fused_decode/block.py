"""Decoder blocks that decode tokens with the CPU kernels, for models that generate token by token.

A transformers block runs some fifty operations per token, each of which costs microseconds even if it computes little:
for a small model, more than all products with its weights. Here norms, rotations, look-ups, rotary embeddings,
attention and the MLP are one pass over float32 numbers. It takes two calls, between which keys and values go through
transformers' cache, or one call for all blocks (`stack`). The next token of several sequences, or several tokens of one
(a draft that is verified), get the bits that each would get alone. Everything else (prompts, padding, training, hooks,
compilation, other attention) uses the block's own forward.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from shiftadd_cli.kernels.ops import is_plain
from shiftadd_cli.native.extension import TYPES
from shiftadd_cli.runtime.fused_decode.block_plan import LINEARS, MOST_ROWS, NORMS, BlockPlan, Form, suits
from shiftadd_cli.runtime.fused_decode.families import BLOCKS, MODELS, name_of
from shiftadd_cli.runtime.fused_decode.stack import PLAN, STACK, LookupModel, current_pass, model_class
from shiftadd_cli.runtime.kv_cache import append, is_known
from shiftadd_cli.runtime.made_class import Reduced, reduce_made

# Classes in transformers for GELU in its tanh form, and for SiLU.
_GELU, _SILU = ("GELUTanh",), ("SiLUActivation", "SiLU")


class LookupBlock(nn.Module):
    """Precedes a class of `BLOCKS` in the MRO, and leaves to that class everything it cannot compute."""

    dense_class: ClassVar[type[nn.Module]]
    self_attn: Any
    mlp: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[rows, tokens, hidden]` → the same, like `dense_class`."""
        cache = kwargs.get("past_key_values")
        if (
            not args
            and _are_new_tokens(hidden_states)
            and self._see_all(hidden_states.shape[1], kwargs.get("attention_mask"), cache)
        ):
            decoded = self._decode(hidden_states, kwargs.get("position_embeddings"), cache)
            if decoded is not None:
                return decoded
        output: Tensor = super().forward(hidden_states, *args, **kwargs)
        return output

    def _see_all(self, tokens: int, mask: Any, cache: Any) -> bool:
        """Whether each of the new tokens sees all tokens before it and itself, in a cache that holds all of them."""
        if tokens == 1:
            return mask is None
        # Without a mask, torch's attention aligns several tokens with the beginning of the cache instead of its end.
        if mask is None or not is_known(cache) or type(mask) is not Tensor or mask.dtype != torch.bool:
            return False
        seen = cache.get_seq_length(self.self_attn.layer_idx) + tokens
        return mask.shape == (1, 1, tokens, seen) and torch.equal(mask[0, 0], _lower_right(tokens, seen))

    def _decode(self, hidden: Tensor, positions: tuple[Tensor, Tensor] | None, cache: Any) -> Tensor | None:
        """The output for new tokens, or None if the kernels do not compute it."""
        watched = torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks
        # The kernels reproduce torch's own attention only.
        if positions is None or watched or self.training or self.self_attn.config._attn_implementation != "sdpa":
            return None
        hidden = hidden.contiguous()
        cosines, sines = (table.contiguous() for table in positions)
        running = current_pass()
        if running is not None and (output := running.decode(self, hidden, cosines, sines, cache)) is not None:
            return output
        if (plan := self._find_plan()) is None or not plan.form.takes(hidden, cosines, sines):
            return None
        queries, keys, values = plan.heads(hidden, cosines, sines)
        if cache is not None:
            keys, values = append(cache, keys, values, self.self_attn.layer_idx)
            keys, values = (_as_read(tensor, hidden.dtype) for tensor in (keys, values))
        return plan.rest(hidden, queries, keys, values)

    def _find_plan(self) -> BlockPlan | None:
        """The plan of this block, or None if the kernels do not compute it."""
        plan: BlockPlan | None = self.__dict__.get(PLAN)
        if plan is None or not plan.watch.holds():
            plan = self.__dict__[PLAN] = self._make_plan()
        # The kernels call no modules, so hooks would not run.
        return None if plan is None or plan.watch.is_heard() else plan

    def _make_plan(self) -> BlockPlan | None:
        family = BLOCKS[name_of(self.dense_class)]
        attention, mlp, outside = self.self_attn, self.mlp, self._modules
        inside, gated = attention._modules, mlp._modules
        places = [(inside, name) for name in LINEARS[:4]] + [(gated, name) for name in LINEARS[4:]]
        linears = {name: holder.get(name) for holder, name in places}
        norm_places = {
            role: (inside if role in ("query", "key") else outside, name) for role, name in family.norms.items()
        }
        norms = dict.fromkeys(NORMS) | {role: holder.get(name) for role, (holder, name) in norm_places.items()}
        if any(norms[role] is None for role in family.norms if role not in ("query", "key")):
            return None
        # Parts of another class may have another forward.
        parts = [attention, mlp, *(norm for norm in norms.values() if norm is not None)]
        if any(type(part).__module__ != self.dense_class.__module__ for part in parts):
            return None
        activation = type(gated.get("act_fn")).__name__
        epsilons = {float(getattr(norm, family.epsilon)) for norm in norms.values() if norm is not None}
        softcap = getattr(attention, "attn_logit_softcapping", None)
        if not all(linears.values()) or activation not in _GELU + _SILU or len(epsilons) != 1 or softcap is not None:
            return None
        size = int(attention.head_dim)
        form = Form(
            heads=getattr(linears["q_proj"], "out_features", 0) // size,
            key_heads=getattr(linears["k_proj"], "out_features", 0) // size,
            head_size=size,
            scale=float(attention.scaling),
            gelu=activation in _GELU,
            unit=family.unit,
            epsilon=epsilons.pop(),
            joint=family.joint,
            residual=float(getattr(self, "residual_multiplier", 1.0)),
            turned=bool(getattr(attention, "use_rope", True)),
        )
        if not suits(linears, norms, form):
            return None
        places += [*norm_places.values(), (outside, "self_attn"), (outside, "mlp"), (gated, "act_fn")]
        return BlockPlan(linears, norms, form, places)

    def __reduce_ex__(self, _: Any) -> Reduced:
        return reduce_made(_block_class, self, without=PLAN)


def fuse_blocks(model: nn.Module) -> None:
    """Let the blocks of a model that belong to a known family decode with the kernels, in place."""
    for module in model.modules():
        if (name := name_of(type(module))) in BLOCKS:
            module.__class__ = _block_class(type(module))
        elif name in MODELS and not isinstance(module, LookupModel):
            module.__class__ = model_class(type(module))


def part_blocks(model: nn.Module) -> None:
    """Undo `fuse_blocks`."""
    for module in model.modules():
        if isinstance(module, LookupBlock | LookupModel):
            module.__class__ = module.dense_class  # type: ignore[assignment]
            for name in (PLAN, STACK):
                module.__dict__.pop(name, None)


_CLASSES: dict[type[nn.Module], type[LookupBlock]] = {}


def _block_class(dense: type[nn.Module]) -> type[LookupBlock]:
    if dense not in _CLASSES:
        # The name stays, because tools that must not split a block recognize it by name.
        _CLASSES[dense] = type(dense.__name__, (LookupBlock, dense), {"dense_class": dense, "__module__": __name__})
    return _CLASSES[dense]


@functools.lru_cache(maxsize=2)
def _lower_right(tokens: int, seen: int) -> Tensor:
    """The mask of the last `tokens` of `seen` tokens, each of which sees those before it and itself."""
    return torch.ones(tokens, seen, dtype=torch.bool).tril(seen - tokens)


def _are_new_tokens(hidden: Tensor) -> bool:
    """Whether this is plain inference of one token for few sequences, or of few tokens for one."""
    return (
        is_plain(hidden)
        and hidden.ndim == 3
        and 1 in hidden.shape[:2]
        and 0 < hidden.shape[0] * hidden.shape[1] <= MOST_ROWS
        and hidden.dtype in TYPES
        and not torch.is_autocast_enabled("cpu")
    )


def _as_read(cached: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values in the form that the kernels read; some caches store another form."""
    cached = cached.to(dtype)
    return cached if cached.stride(-1) == 1 else cached.contiguous()
