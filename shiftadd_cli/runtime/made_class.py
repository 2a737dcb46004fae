"""Pickling and copying of modules whose class was derived from the dense class at run time and cannot be imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Maker = Callable[[type[nn.Module]], type[nn.Module]]
# The result of `__reduce_ex__`.
Reduced = tuple[Callable[..., nn.Module], tuple[Maker, type[nn.Module]], dict[str, Any]]


def reduce_made(make: Maker, module: Any, *, without: str | None = None) -> Reduced:
    """The result of `__reduce_ex__` for a module of class `make(module.dense_class)`; `make` is a top-level function.

    without: an attribute that is valid only in this process and is left out of copies and files.
    """
    state = {name: value for name, value in module.__getstate__().items() if name != without}
    return _bare, (make, module.dense_class), state


def _bare(make: Maker, dense: type[nn.Module]) -> nn.Module:
    kind = make(dense)
    return kind.__new__(kind)
