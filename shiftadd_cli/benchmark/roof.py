"""How fast the machine reads memory: what a layer that reads its weights once cannot beat."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from shiftadd_cli.benchmark.timing import Clock

_LEAST_BYTES, _MOST_BYTES = 256 << 20, 1 << 30


@dataclass(frozen=True)
class Roof:
    """The fastest reading seen.

    Attributes:
        bytes_per_second: of the best of all passes.
        method: what read so fast.
        buffer_bytes: length of what was read.
    """

    bytes_per_second: float
    method: str
    buffer_bytes: int

    def share(self, nbytes: int, seconds: float) -> float:
        """Of the roof, that reading so many bytes in so many seconds comes to."""
        return nbytes / seconds / self.bytes_per_second

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def roof_bytes(cache_bytes: int, free_bytes: int) -> int:
    """Length of the buffer to read: four times the last-level cache, within what memory allows."""
    most = max(1 << 20, min(_MOST_BYTES, free_bytes // 4))
    return min(most, max(_LEAST_BYTES, 4 * cache_bytes))


def read_roof(nbytes: int, *, passes: int = 5, clock: Clock | None = None) -> Roof:
    """Read a buffer of about `nbytes` from end to end in several ways, `passes` times each, with torch's threads.

    The best pass of all counts, since whatever disturbs a pass only makes it slower. No way is known to reach what the
    memory can do, so this is a lower bound, and something that reads better can pass it.
    """
    clock = clock or Clock()
    columns = 1 << 14
    buffer = _buffer(max(columns, nbytes // (4 * columns) * columns))
    matrix, vector = buffer.view(-1, columns), torch.ones(columns)
    ways: dict[str, Callable[[], object]] = {
        "sum": buffer.sum,
        "dot": lambda: torch.dot(buffer, buffer),
        "matrix times vector": lambda: torch.mv(matrix, vector),
    }
    times = {name: min(clock.time(way).wall for _ in range(passes)) for name, way in ways.items()}
    best = min(times, key=times.__getitem__)
    return Roof(buffer.nbytes / times[best], best, buffer.nbytes)


def better_roof(one: Roof, other: Roof) -> Roof:
    """The higher of the two."""
    return max(one, other, key=lambda roof: roof.bytes_per_second)


def _buffer(count: int) -> Tensor:
    """float32 `[count]` of ones, on huge pages where the system gives them when asked: they are read faster."""
    memory = mmap.mmap(-1, 4 * count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1)
