"""One linear layer of vLLM over the compressed matrices it consists of, each loaded separately."""

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
    """`x @ W.T`, where the rows of W are those of one or more compressed matrices, one after the other.

    The tensors of a part are loaded into a `PackedLinear` of its own, since parts may differ in bits. `finish` then
    joins neighbours of the same form into one layer. The output consists of the outputs of the parts, side by side; a
    run of joined parts counts as one `PackedLinear` over all its rows.
    """

    def __init__(self, layouts: Mapping[str, PackedLayout], dtype: torch.dtype | None = None) -> None:
        """layouts: of every part, by its name in the checkpoint; all have the same columns. dtype: as for
        `PackedLinear`. Tensors start as 0, on torch's default device."""
        super().__init__()
        self.names = tuple(layouts)
        self.dtype = dtype
        self.parts = nn.ModuleList(PackedLinear(layout, bias=False, dtype=dtype) for layout in layouts.values())
        self._loaded: set[str] = set()

    def stored(self) -> dict[str, torch.dtype]:
        """Suffixes of all tensors that any part has, with their dtype in the first such part."""
        kinds: dict[str, torch.dtype] = {}
        for layer in self._layers():
            for suffix, (_, kind) in layer.layout.tensors().items():
                kinds.setdefault(suffix, kind)
        return kinds

    def load(self, suffix: str, tensor: Tensor, shard: object = None) -> None:
        """Take a tensor of the checkpoint; `shard` is vLLM's name of the part, see `parts.part_index`.

        Raises ArtifactError for a tensor whose shape or dtype differs from the format, or that no part has.
        """
        index = part_index(shard, len(self.names), ", ".join(self.names))
        layer, name = self._layers()[index], f"{self.names[index]}.{suffix}"
        copy_checked(getattr(layer, suffix, None), tensor, name)
        self._loaded.add(name)

    def finish(self) -> None:
        """Join parts where possible and choose kernels, once everything is loaded; calling it again changes nothing.

        Raises ArtifactError for missing tensors, and for values that no writer stores.
        """
        if any(layer.kernel is not None for layer in self._layers()):
            return
        layers = dict(zip(self.names, self._layers(), strict=True))
        check_complete(
            [f"{name}.{suffix}" for name, layer in layers.items() for suffix in layer.layout.tensors()], self._loaded
        )
        for name, layer in layers.items():
            check_values(name, layer.packed().tensors, layer.in_features)
        joined = [join(run) for run in runs([layer.packed() for layer in layers.values()])]
        # Frees the parts before the kernels arrange their own copies.
        self.parts = nn.ModuleList(PackedLinear.from_weight(weight, dtype=self.dtype) for weight in joined)
        del layers
        prepare_layers(self._layers())

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., in]` → `[..., out]` in the dtype of `x`; `bias` `[out]` is added to the rounded product."""
        outputs = [layer(x) for layer in self.parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output if bias is None else output + bias.to(output.dtype)

    def _layers(self) -> list[PackedLinear]:
        return [layer for layer in self.parts if isinstance(layer, PackedLinear)]
