"""For tests of the compiled CPU kernels: their marker, matrices that they support, and numbers of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest
import torch
from artifacts import FORMATS
from formats import layout_on
from hypothesis import strategies as st

from shiftadd_cli.bcq.choices import CODE_BITS, PLANES, Primitive
from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.kernels.cpu_weight import supports
from shiftadd_cli.native.extension import cpu_extension

T = TypeVar("T")

needs_kernels = pytest.mark.skipif(cpu_extension() is None, reason="installed without compiled kernels")


TRELLISES: list[tuple[Primitive, int]] = [
    (primitive, bits) for primitive in ("trellis1", "trellis2") for bits in CODE_BITS[primitive]
]


@st.composite
def supported_layouts(draw: st.DrawFn) -> PackedLayout:
    """Layouts of all bits, formats and ragged sizes, with several stripes of rows and several chunks of columns."""
    columns = draw(st.integers(1, 40) | st.integers(100, 330))
    groups: list[int | str] = [16, 20, 32, 64, 100, 128, "all"]
    group = draw(st.sampled_from(groups))
    grid = ScaleGrid.resolve(draw(st.integers(1, 40) | st.integers(120, 300)), columns, draw(st.integers(1, 9)), group)
    primitive, bits = draw(st.one_of(st.tuples(st.just(PLANES), st.integers(1, 8)), st.sampled_from(TRELLISES)))
    layout = layout_on(
        grid,
        bits,
        draw(st.sampled_from(FORMATS)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        primitive=primitive,
    )
    assert supports(layout)
    return layout


def on_threads(counts: Iterable[int], run: Callable[[], T]) -> list[T]:
    """The results of `run` with each of these numbers of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results
