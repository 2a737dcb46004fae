"""Pickles and copies of modules whose class was made while running, from that of the dense module, and has no name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Maker = Callable[[type[nn.Module]], type[nn.Module]]
# As `__reduce_ex__` gives it.
Reduced = tuple[Callable[..., nn.Module], tuple[Maker, type[nn.Module]], dict[str, Any]]


def reduce_made(make: Maker, module: Any, *, without: str | None = None) -> Reduced:
    """For `__reduce_ex__` of a module of the class `make(module.dense_class)`; `make` is a function of a module.

    without: an attribute of this process alone, which no copy and no file gets.
    """
    state = {name: value for name, value in module.__getstate__().items() if name != without}
    return _bare, (make, module.dense_class), state


def _bare(make: Maker, dense: type[nn.Module]) -> nn.Module:
    made = make(dense)
    return made.__new__(made)
