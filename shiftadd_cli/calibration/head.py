"""What comes after the blocks (norms, projections, head, factors, soft caps), as the model's own code runs it.

The model's own forward runs with its blocks replaced by stubs that return given hidden states. All that comes after
them acts on each token by itself, so it may run on slices of tokens: logits of a large vocabulary never exist for a
whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def dress(output: Any) -> Callable[[Tensor], Any]:
    """What puts other hidden states in the place of those in a block's `output` (bare, or the first of a tuple)."""
    if isinstance(output, (tuple, list)):
        others = (None,) * (len(output) - 1)
        return lambda hidden: (hidden, *others)
    return lambda hidden: hidden


@contextmanager
def returning(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """While this lasts, each of `blocks` does nothing and returns `output`, hidden states that were dressed."""
    for block in blocks:
        block.__dict__["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def slices(windows: int, tokens: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles of windows and tokens that cover `windows` x `tokens`, each of at most `most` (at least 1) tokens."""
    step = min(tokens, most)
    group = max(1, most // tokens)
    for top in range(0, windows, group):
        for left in range(0, tokens, step):
            yield slice(top, min(top + group, windows)), slice(left, min(left + step, tokens))
