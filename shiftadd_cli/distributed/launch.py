"""The team that a process belongs to, from what torchrun tells it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from shiftadd_cli.errors import RecipeError, ShiftaddError, TeamError, first_line

if TYPE_CHECKING:
    from shiftadd_cli.distributed.team import Team


def launched_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_rank() -> int:
    """Number of this process among those that torchrun started on this machine; 0 without it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def speaks() -> bool:
    """Whether this is the process, of those that torchrun started on this machine, that tells the user of errors: they
    all have the same options, and learn of each other's errors."""
    return launched_size() == 1 or local_rank() == 0


@contextmanager
def join_team(timeout: float) -> Iterator[Team]:
    """The team of this process: all that torchrun started, or this one alone.

    timeout: seconds that an exchange waits for all, and so the longest that one process may work alone.

    A process that leaves with an error tells the others why. Raises RecipeError where they cannot be reached.
    """
    if launched_size() == 1:
        from shiftadd_cli.distributed.team import ALONE

        yield ALONE
        return
    import torch.distributed as dist

    from shiftadd_cli.distributed.torch_team import TorchTeam
    from shiftadd_cli.distributed.watch import Watch

    rank, size = int(os.environ["RANK"]), launched_size()
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as failure:
        raise RecipeError(
            f"Process {rank} cannot reach the {size - 1} others ({first_line(failure)}); check --nnodes, "
            "--rdzv-endpoint and the network."
        ) from failure
    watch = Watch(dist.distributed_c10d._get_default_store(), rank, size)
    watch.start()
    try:
        yield TorchTeam(rank, size, watch)
        # Whoever holds the store leaves last.
        dist.barrier()
    except TeamError:
        # The fault is that of another, which the others see for themselves.
        watch.leave("")
        raise
    except ShiftaddError as failure:
        watch.leave(str(failure))
        raise
    except BaseException as failure:
        watch.leave("" if isinstance(failure, KeyboardInterrupt) else first_line(failure))
        raise
    finally:
        watch.stop()
        with suppress(RuntimeError):
            dist.destroy_process_group()
