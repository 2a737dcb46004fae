"""A decoder block in the form that the CPU kernels take, see native/block.h."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from shiftadd_cli.kernels.cpu_weight import CpuWeight, native_form
from shiftadd_cli.kernels.select import Kernel
from shiftadd_cli.native.extension import TYPES, cpu_extension
from shiftadd_cli.runtime.fused_decode.module_watch import Place, Watch
from shiftadd_cli.runtime.linear import PackedLinear

# The same as `kTileRows` in native/lookups.h.
MOST_ROWS = 8
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The same as `Norms` in native/block.h.
NORMS = ("before_attention", "before_mlp", "after_attention", "after_mlp", "query", "key")


@dataclass(frozen=True)
class Form:
    """The settings of a block, in addition to its layers.

    heads, key_heads: of queries, and of keys and values; head_size: numbers per head; scale: of their products.
    gelu: the gate uses GELU, in its tanh form, instead of SiLU. unit: added to the weights of norms. joint: the
    norms of queries and keys take all heads as one row. residual: factor of the outputs of attention and the MLP, which
    are added to the hidden state. turned: queries and keys are rotated by their positions.
    """

    heads: int
    key_heads: int
    head_size: int
    scale: float
    gelu: bool = False
    unit: float = 0.0
    epsilon: float = 1e-6
    joint: bool = False
    residual: float = 1.0
    turned: bool = True

    def takes(self, hidden: Tensor, cosines: Tensor, sines: Tensor) -> bool:
        """Whether the kernels take rotary embeddings of this form with hidden states `[sequences, tokens, in]`."""
        shape, (sequences, tokens, _) = cosines.shape, hidden.shape
        fits = shape == sines.shape and shape[1:] == (tokens, self.head_size) and shape[0] in (1, sequences)
        return fits and cosines.dtype == sines.dtype and cosines.dtype in TYPES


class BlockPlan:
    """The data that the kernels need for one block, valid as long as `watch` holds.

    form: the settings of the block; precision: of its layers; native: the block in the extension.
    """

    def __init__(
        self,
        linears: Mapping[str, PackedLinear],
        norms: Mapping[str, Any],
        form: Form,
        places: Iterable[Place],
    ) -> None:
        """linears, norms: by the names in `LINEARS` and `NORMS`; see `suits` for the conditions. places: those of all
        modules that are computed without being called."""
        self.form = form
        self.precision = linears["q_proj"].precision
        places = list(places)
        numbers = _numbers(linears.values(), norms.values())
        self.watch = Watch(
            places=[
                *places,
                *((linear._buffers, "words") for linear in linears.values()),
                *((holder, name) for holder, name, _ in numbers),
            ],
            tensors=[tensor for _, _, tensor in numbers],
            modules=[module for holder, name in places if (module := holder.get(name)) is not None],
        )
        self._signs: list[Tensor] = []
        self.native = cpu_extension().DecoderBlock(
            linears=[self._projection(linears[name]) for name in LINEARS],
            norms=[None if norms[name] is None else _float32(norms[name].weight) + form.unit for name in NORMS],
            joint=form.joint,
            epsilon=form.epsilon,
            gelu=form.gelu,
            head_size=form.head_size,
            scale=form.scale,
            residual=form.residual,
            turned=form.turned,
        )

    def heads(self, hidden: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one new token of each sequence, or of consecutive tokens of one sequence.

        hidden: `[sequences, tokens, in]`, float32 or bfloat16, of at most `MOST_ROWS` tokens in all; cosines, sines:
        `[sequences or 1, tokens, head_size]`, both float32 or bfloat16. Returns queries float32 `[sequences * tokens,
        heads, head_size]`, keys and values `[sequences, key_heads, tokens, head_size]` in the dtype of `hidden`.
        """
        (sequences, tokens, _), form = hidden.shape, self.form
        queries = torch.empty(sequences * tokens, form.heads, form.head_size, dtype=torch.float32)
        keys = torch.empty(sequences, form.key_heads, tokens, form.head_size, dtype=hidden.dtype)
        values = torch.empty_like(keys)
        fast, threads = self.precision.is_fast(hidden.dtype), torch.get_num_threads()
        self.native.heads(hidden, cosines, sines, queries, keys, values, fast, threads)
        return queries, keys, values

    def rest(self, hidden: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The block's output, of the shape of its input `hidden`, from the queries and from all keys and values
        `[sequences, key_heads, all tokens, head_size]` in the dtype of the input, with the last dimension contiguous.
        Each of several new tokens of a sequence sees those before it and itself.

        Raises RuntimeError for keys and values of another form, since the cache may come from anywhere.
        """
        form = self.form
        expected = (hidden.shape[0], form.key_heads, keys.shape[2], form.head_size)
        if any(
            tensor.shape != expected or tensor.dtype != hidden.dtype or tensor.stride(3) != 1
            for tensor in (keys, values)
        ):
            raise RuntimeError(f"The cache gives {list(keys.shape)} and {list(values.shape)}, not {list(expected)}.")
        output = torch.empty_like(hidden)
        fast, threads = self.precision.is_fast(hidden.dtype), torch.get_num_threads()
        self.native.rest(hidden, queries, keys, values, output, fast, threads)
        return output

    def _projection(self, linear: PackedLinear) -> Any:
        weight = linear.on_cpu()
        return cpu_extension().Projection(
            native_form(linear.layout),
            weight.words,
            weight.scale_codes,
            weight.scales,
            weight.offsets,
            weight.row_scale,
            None if linear.bias is None else _float32(linear.bias),
            self._shared_signs(weight),
        )

    def _shared_signs(self, weight: CpuWeight) -> Tensor | None:
        """The signs, one tensor for all equal signs: the kernels rotate an input once per tensor."""
        if weight.signs is None:
            return None
        for signs in self._signs:
            if torch.equal(signs, weight.signs):
                return signs
        self._signs.append(weight.signs)
        return weight.signs


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def suits(linears: Mapping[str, Any], norms: Mapping[str, Any], form: Form) -> TypeGuard[Mapping[str, PackedLinear]]:
    """Whether the kernels can compute the block: all linears use look-up tables of one kind, and sizes match."""
    packed = [linear for linear in linears.values() if isinstance(linear, PackedLinear)]
    if len(packed) < len(LINEARS):
        return False
    settings = {(linear.kernel, linear.layout.outliers, linear.precision) for linear in packed}
    if settings != {(Kernel.CPU, 0, packed[0].precision)}:
        return False
    # Inference tensors have no version counter.
    tensors = [tensor for _, _, tensor in _numbers(packed, norms.values())]
    if any(tensor.is_inference() or tensor.device.type != "cpu" for tensor in tensors):
        return False
    width, key_width = form.heads * form.head_size, form.key_heads * form.head_size
    hidden, inner = linears["q_proj"].in_features, linears["gate_proj"].out_features
    sizes = {
        "q_proj": (width, hidden),
        "k_proj": (key_width, hidden),
        "v_proj": (key_width, hidden),
        "o_proj": (hidden, width),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    fit = all((linears[name].out_features, linears[name].in_features) == sides for name, sides in sizes.items())
    return fit and form.key_heads > 0 and form.heads % form.key_heads == 0 and form.head_size % 2 == 0


def _numbers(linears: Iterable[PackedLinear], norms: Iterable[Any]) -> list[tuple[dict[str, Any], str, Tensor]]:
    """The parameters that the kernels take as float32 copies: dictionary, name and tensor."""
    biases = [(linear._parameters, "bias", linear.bias) for linear in linears if linear.bias is not None]
    return [*biases, *((norm._parameters, "weight", norm.weight) for norm in norms if norm is not None)]
