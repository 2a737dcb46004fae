"""Checks that modules have not changed since the addresses of their tensors were taken.

The check runs before every token, over hundreds of modules whose dictionaries the weights have evicted from the CPU
cache by then, so the extension does it.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from shiftadd_cli.native.extension import cpu_extension

# A dictionary of modules, parameters or buffers, and a name in it.
Place = tuple[dict[str, Any], str]

_VERSION = attrgetter("_version")


class Watch:
    """A record of the state that must not change."""

    def __init__(self, places: Iterable[Place], tensors: Iterable[Tensor], modules: Iterable[nn.Module]) -> None:
        """places: each must keep its object, or stay empty. tensors: their numbers and addresses must stay the same.
        modules: those that are computed without being called."""
        modules, tensors = tuple(modules), tuple(tensors)
        self._set(
            tuple((holder, name, holder.get(name)) for holder, name in places),
            tuple((tensor, tensor.data_ptr(), tensor._version) for tensor in tensors),
            modules,
        )

    @classmethod
    def over(cls, watches: Iterable[Watch]) -> Watch:
        """One watch with the checks of several."""
        joined, watches = cls.__new__(cls), tuple(watches)
        joined._set(
            tuple(entry for watch in watches for entry in watch._standing),
            tuple(entry for watch in watches for entry in watch._numbers),
            tuple(module for watch in watches for module in watch._modules),
        )
        return joined

    def _set(
        self,
        standing: tuple[tuple[dict[str, Any], str, Any], ...],
        numbers: tuple[tuple[Tensor, int, int], ...],
        modules: tuple[nn.Module, ...],
    ) -> None:
        self._standing, self._numbers, self._modules = standing, numbers, modules
        self._tensors = tuple(tensor for tensor, _, _ in numbers)
        self._addresses = [address for _, address, _ in numbers]
        self._versions = [version for _, _, version in numbers]
        hooks = tuple(registry for module in modules for registry in (module._forward_hooks, module._forward_pre_hooks))
        attributes = tuple(module.__dict__ for module in modules)
        columns = tuple(zip(*standing, strict=True)) if standing else ((), (), ())
        # Keeps alive the objects that the extension only borrows.
        self._references = (*columns, hooks, attributes)
        self._dictionaries = cpu_extension().Dictionaries(*self._references)

    def holds(self) -> bool:
        """Whether every place still has its object, and every tensor its numbers."""
        return (
            self._dictionaries.hold()
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(_VERSION, self._tensors)) == self._versions
        )

    def is_heard(self) -> bool:
        """Whether any of the modules has hooks, or its own `forward` instead of its class's."""
        return not self._dictionaries.silent("forward")
