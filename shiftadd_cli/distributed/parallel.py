"""Independent pieces of work on worker threads, each with one compute thread of its own.

The solver consists of many operations on small tensors. Splitting each of them over all cores costs a barrier per
operation, and on a busy machine a barrier waits for a core that something else is using: seven times the processor
time was measured.
Pieces of rows on a thread each have no barriers, and since the pieces do not depend on the number of threads,
neither do the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def map_pieces(function: Callable[[T], R], pieces: Iterable[T]) -> list[R]:
    """`function` of every piece, in order, on as many threads as torch is set to use."""
    workers = torch.get_num_threads()
    try:
        # Set in each worker: OpenMP keeps the number of threads per calling thread.
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, pieces))
    finally:
        # torch also remembers the last number set anywhere, for threads yet to be born.
        torch.set_num_threads(workers)
