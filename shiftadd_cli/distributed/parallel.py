"""Independent pieces of work on worker threads, each with a single compute thread.

The solver consists of many operations on small tensors. Splitting each operation over all cores costs a barrier per
operation, and on a busy machine a barrier waits for a core that another process is using: we measured seven times the
processor time. Pieces of rows on separate threads need no barriers. The pieces do not depend on the number of threads,
so the results do not either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def map_pieces(function: Callable[[T], R], pieces: Iterable[T]) -> list[R]:
    """The results of `function` for all pieces, in order, on as many threads as torch is set to use."""
    workers = torch.get_num_threads()
    try:
        # Set in each worker: OpenMP keeps the number of threads per calling thread.
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, pieces))
    finally:
        # torch also applies the last number set in any thread to new threads.
        torch.set_num_threads(workers)
