"""transformers' own record of which parameters are tied, kept true while modules change the names of theirs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn


class Ties:
    """The ties of a model and of all transformers models inside it, as they are before modules are replaced."""

    def __init__(self, model: nn.Module) -> None:
        from transformers import PreTrainedModel

        self._model = model
        # Asked now, since transformers expands patterns by looking at the parameters there are.
        self._expanded: list[tuple[str, Any, dict[str, str]]] = [
            (f"{name}." if name else "", each, each.get_expanded_tied_weights_keys(all_submodels=False))
            for name, each in model.named_modules()
            if isinstance(each, PreTrainedModel)
        ]

    def group(self, module: str) -> list[str]:
        """Names of the modules whose weight is that of `module`: the one it is stored for first, `module` included."""
        ties: dict[str, str] = getattr(self._model, "all_tied_weights_keys", {})
        weight = f"{module}.weight"
        source = ties.get(weight, weight)
        members = [source, *(target for target, each in ties.items() if each == source)]
        return [name.removesuffix(".weight") for name in members]

    def rename(self, modules: Collection[str], old: str, *new: str) -> None:
        """Record that the parameter `old` of each of `modules` is now the parameters `new`; without any it is gone."""

        def renamed(ties: dict[str, str], prefix: str) -> dict[str, str]:
            pairs = [
                pair
                for target, source in ties.items()
                for pair in zip(names(target, prefix), names(source, prefix), strict=True)
            ]
            return dict(pairs)

        def names(name: str, prefix: str) -> list[str]:
            parent, _, leaf = (prefix + name).rpartition(".")
            if leaf != old or parent not in modules:
                return [name]
            return [f"{parent}.{suffix}".removeprefix(prefix) for suffix in new]

        for number, (prefix, part, expanded) in enumerate(self._expanded):
            if expanded:
                part._tied_weights_keys = renamed(expanded, prefix)
                self._expanded[number] = (prefix, part, part._tied_weights_keys)
            part.all_tied_weights_keys = renamed(part.all_tied_weights_keys, prefix)
