"""Whether modules are still what addresses were taken of.

Asked before every token, of hundreds of modules whose dictionaries the weights have driven out of the cache by then: so
the extension looks them through.
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
    """What must not change, as it was when this was made."""

    def __init__(self, places: Iterable[Place], tensors: Iterable[Tensor], modules: Iterable[nn.Module]) -> None:
        """places: where the same object, or none, must stay. tensors: whose numbers must stay, and where they lie.
        modules: those that are computed without being called."""
        modules, tensors = tuple(modules), tuple(tensors)
        self._set(
            tuple((holder, name, holder.get(name)) for holder, name in places),
            tuple((each, each.data_ptr(), each._version) for each in tensors),
            modules,
        )

    @classmethod
    def over(cls, watches: Iterable[Watch]) -> Watch:
        """One that asks what several ask."""
        joined, watches = cls.__new__(cls), tuple(watches)
        joined._set(
            tuple(each for watch in watches for each in watch._standing),
            tuple(each for watch in watches for each in watch._numbers),
            tuple(each for watch in watches for each in watch._modules),
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
        hooks = tuple(each for module in modules for each in (module._forward_hooks, module._forward_pre_hooks))
        attributes = tuple(module.__dict__ for module in modules)
        columns = tuple(zip(*standing, strict=True)) if standing else ((), (), ())
        # They hold what the extension only borrows.
        self._kept = (*columns, hooks, attributes)
        self._dictionaries = cpu_extension().Dictionaries(*self._kept)

    def holds(self) -> bool:
        """Whether every place still has its object, and every tensor its numbers."""
        return (
            self._dictionaries.hold()
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(_VERSION, self._tensors)) == self._versions
        )

    def is_heard(self) -> bool:
        """Whether somebody wants to be called when one of the modules is, or calls something else in its place."""
        return not self._dictionaries.silent("forward")
