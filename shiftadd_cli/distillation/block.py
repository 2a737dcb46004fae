"""One stored block of a compressed model, with its tunable parameters.

Codes and scales are fixed, so the matrices are decoded once and their gradients are never computed. The tunable parts
of a linear are its row scale, which is a factor of its output, and its bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight
from shiftadd_cli.blockwise.calls import BlockCall
from shiftadd_cli.blockwise.forward import hooked
from shiftadd_cli.distillation.vectors import Reader, TunedVectors
from shiftadd_cli.source import LinearSpec

_ROW_SCALE = "weight_row_scale"


class TunedBlock:
    """`module`, the block called `name` of the skeleton, with its linears stored in the layouts of `linears`.

    Its parameters are not read, and may be on meta; its buffers must be on the device when it runs.

    Attributes:
        factors: factors of the row scales, by path of the linear in the block, float32 `[out]`, where a linear has row
            scales.
        vectors: the block's other one-dimensional parameters, by name in the block.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        linears: Sequence[tuple[LinearSpec, PackedLayout]],
        read: Reader,
        device: torch.device,
    ) -> None:
        self.name, self._module, self._read, self._device = name, module, read, device
        self._linears = {spec.kind: (spec, layout) for spec, layout in linears}
        self._dtypes = {path: parameter.dtype for path, parameter in module.named_parameters()}
        self._row_scales = {
            spec.kind: read(f"{spec.name}.{_ROW_SCALE}").to(device)
            for spec, layout in linears
            if layout.scales.row_scale
        }
        self.factors = {
            kind: nn.Parameter(torch.ones_like(scale, dtype=torch.float32)) for kind, scale in self._row_scales.items()
        }
        self.vectors = TunedVectors(module.named_parameters(), lambda path: read(f"{name}.{path}"), device)

    def parameters(self) -> Iterator[nn.Parameter]:
        """All tunable parameters."""
        yield from self.factors.values()
        yield from self.vectors.free.values()

    def decoded(self) -> dict[str, Tensor]:
        """All other parameters by name in the block, in their compute dtype, with matrices decoded."""
        matrices = {f"{kind}.weight": linear for kind, linear in self._linears.items()}
        result = {}
        for path, dtype in self._dtypes.items():
            if path in self.vectors.free:
                continue
            if path not in matrices:
                result[path] = self._read(f"{self.name}.{path}").to(self._device, dtype)
                continue
            spec, layout = matrices[path]
            stored = {suffix: self._read(f"{spec.name}.{suffix}").to(self._device) for suffix in layout.tensors()}
            result[path] = spec.turned(QuantizedWeight(layout, stored).decode()).to(dtype).contiguous()
        return result

    def run(self, call: BlockCall, hidden: Tensor, decoded: Mapping[str, Tensor]) -> Tensor:
        """Output hidden states of the block, given `decoded` matrices and the current tunable parameters."""
        state = dict(decoded) | self.vectors.computed()
        handles = []
        for kind in self.factors:
            # The factor must not scale the bias, so the hook adds the bias after scaling.
            bias = state.get(f"{kind}.bias")
            if bias is not None:
                state[f"{kind}.bias"] = torch.zeros_like(bias)
            hook = _scaled(self._factor(kind), bias)
            handles.append(self._module.get_submodule(kind).register_forward_hook(hook))
        with hooked(handles):
            return call.run(lambda *args, **named: functional_call(self._module, state, args, named), hidden)

    def backward(self, call: BlockCall, hidden: Tensor, gradient: Tensor, decoded: Mapping[str, Tensor]) -> Tensor:
        """Gradient at the input `hidden`, given that at the output; accumulates gradients of the tunable parameters."""
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            output = self.run(call, hidden, decoded)
        torch.autograd.backward(output, gradient, inputs=[hidden, *self.parameters()])
        assert hidden.grad is not None, "the output depends on the input"
        return hidden.grad

    def tensors(self) -> dict[str, Tensor]:
        """The tuned values as stored, by name in the artifact."""
        with torch.no_grad():
            scales = {f"{self._linears[kind][0].name}.{_ROW_SCALE}": self._scale(kind) for kind in self.factors}
        return scales | {f"{self.name}.{path}": vector for path, vector in self.vectors.stored().items()}

    def _scale(self, kind: str) -> Tensor:
        """The tuned row scale as stored."""
        stored = self._row_scales[kind]
        return (stored.float() * self.factors[kind].detach()).to(stored.dtype)

    def _factor(self, kind: str) -> Tensor:
        """The effective factor of the row scale after rounding, with the gradient of the free factor."""
        free, before = self.factors[kind], self._row_scales[kind].float()
        rounded = torch.where(before == 0, 1.0, self._scale(kind).float() / before)
        return free + (rounded - free.detach())


def _scaled(factor: Tensor, bias: Tensor | None) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook that scales the output features in float32 and adds a bias."""

    def scale(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        scaled = output.float() * factor
        if bias is not None:
            scaled = scaled + bias
        return scaled.to(output.dtype)

    return scale
