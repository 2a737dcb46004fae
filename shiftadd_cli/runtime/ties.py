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

    def rename(self, modules: Collection[str], old: str, new: str) -> None:
        """Record that the parameter `old` of each of `modules` is now called `new`."""

        def renamed(ties: dict[str, str], prefix: str) -> dict[str, str]:
            return {one(target, prefix): one(source, prefix) for target, source in ties.items()}

        def one(name: str, prefix: str) -> str:
            parent, _, leaf = (prefix + name).rpartition(".")
            return f"{parent}.{new}".removeprefix(prefix) if leaf == old and parent in modules else name

        for prefix, each, expanded in self._expanded:
            if expanded:
                each._tied_weights_keys = renamed(expanded, prefix)
            each.all_tied_weights_keys = renamed(each.all_tied_weights_keys, prefix)
