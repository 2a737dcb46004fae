"""One linear layer of vLLM over the compressed matrices it consists of, each loaded by itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.runtime.linear import PackedLinear
from shiftadd_cli.runtime.loading import check_values
from shiftadd_cli.runtime.prepare import prepare_layers
from shiftadd_cli.vllm_plugin.joining import join, runs
from shiftadd_cli.vllm_plugin.loading import check_complete, copy_checked
from shiftadd_cli.vllm_plugin.parts import part_index


class FusedLinear(nn.Module):
    """`x @ W.T` with the rows of W those of several compressed matrices, one after the other; a single one likewise.

    The tensors of a part are loaded into a `PackedLinear` of its own, since parts may differ in bits. `finish` then
    joins neighbours of one form, which are one layer from there on. The output is the outputs of the parts, side by
    side: of a run of joined parts as of one `PackedLinear` over all its rows.
    """

    def __init__(self, layouts: Mapping[str, PackedLayout], dtype: torch.dtype | None = None) -> None:
        """layouts: of every part, by its name in the checkpoint; all have the same columns. dtype: as of
        `PackedLinear`. Tensors start as 0, on torch's default device."""
        super().__init__()
        self.names = tuple(layouts)
        self.dtype = dtype
        self.parts = nn.ModuleList(PackedLinear(each, bias=False, dtype=dtype) for each in layouts.values())
        self._loaded: set[str] = set()

    def stored(self) -> dict[str, torch.dtype]:
        """Suffixes of all tensors that some part has, and the dtype in the first of them."""
        kinds: dict[str, torch.dtype] = {}
        for layer in self._layers():
            for suffix, (_, kind) in layer.layout.tensors().items():
                kinds.setdefault(suffix, kind)
        return kinds

    def load(self, suffix: str, tensor: Tensor, shard: object = None) -> None:
        """Take a tensor of the checkpoint; `shard` is what vLLM calls the part, see `parts.part_index`.

        Raises ArtifactError for a tensor of another shape or dtype than the format says, or that no part has.
        """
        place = part_index(shard, len(self.names), ", ".join(self.names))
        layer, name = self._layers()[place], f"{self.names[place]}.{suffix}"
        copy_checked(getattr(layer, suffix, None), tensor, name)
        self._loaded.add(name)

    def finish(self) -> None:
        """Join what can be joined and choose kernels, once everything is loaded; calling it again changes nothing.

        Raises ArtifactError for tensors that never came, or that hold what no writer stores.
        """
        if any(layer.kernel is not None for layer in self._layers()):
            return
        layers = dict(zip(self.names, self._layers(), strict=True))
        check_complete(
            [f"{name}.{each}" for name, layer in layers.items() for each in layer.layout.tensors()], self._loaded
        )
        for name, layer in layers.items():
            check_values(name, layer.packed().tensors, layer.in_features)
        joined = [join(run) for run in runs([layer.packed() for layer in layers.values()])]
        # The parts go before the kernels arrange their own copies.
        self.parts = nn.ModuleList(PackedLinear.from_weight(each, dtype=self.dtype) for each in joined)
        del layers
        prepare_layers(self._layers())

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., in]` → `[..., out]` in the dtype of `x`; `bias` `[out]` is added to the rounded product."""
        outputs = [layer(x) for layer in self.parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output if bias is None else output + bias.to(output.dtype)

    def _layers(self) -> list[PackedLinear]:
        return [layer for layer in self.parts if isinstance(layer, PackedLinear)]
