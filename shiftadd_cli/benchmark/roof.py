"""Memory read bandwidth of the machine: the upper limit for a layer that reads its weights once."""

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
    """The highest measured read bandwidth.

    Attributes:
        bytes_per_second: bandwidth of the best pass.
        method: name of the fastest operation.
        buffer_bytes: length of the buffer.
    """

    bytes_per_second: float
    method: str
    buffer_bytes: int

    def share(self, nbytes: int, seconds: float) -> float:
        """Share of the roof for a read of `nbytes` in `seconds`."""
        return nbytes / seconds / self.bytes_per_second

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def roof_bytes(cache_bytes: int, free_bytes: int) -> int:
    """Length of the buffer to read: four times the last-level cache, within the memory limits."""
    most = max(1 << 20, min(_MOST_BYTES, free_bytes // 4))
    return min(most, max(_LEAST_BYTES, 4 * cache_bytes))


def read_roof(nbytes: int, *, passes: int = 5, clock: Clock | None = None) -> Roof:
    """Read a buffer of about `nbytes` from end to end in several ways, `passes` times each, with torch's threads.

    The best pass counts, since any disturbance only makes a pass slower. None of the ways is guaranteed to saturate the
    memory, so the result is a lower bound that a better reader can exceed.
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
    """The roof with the higher bandwidth."""
    return max(one, other, key=lambda roof: roof.bytes_per_second)


def _buffer(count: int) -> Tensor:
    """float32 `[count]` of ones, on huge pages if the system supports them, since these are read faster."""
    memory = mmap.mmap(-1, 4 * count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1)
