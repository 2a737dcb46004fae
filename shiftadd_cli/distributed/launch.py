"""The team of a process, from the environment that torchrun sets."""

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
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_rank() -> int:
    """Index of this process among those that torchrun started on this machine; 0 without it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def speaks() -> bool:
    """Whether this process reports errors to the user. One per machine does, since all processes have the same options
    and learn of each other's errors."""
    return launched_size() == 1 or local_rank() == 0


@contextmanager
def join_team(timeout: float) -> Iterator[Team]:
    """The team of this process: all processes that torchrun started, or this one alone.

    timeout: seconds that an exchange waits for all processes; also the longest time that one process may work alone.

    A process that leaves with an error tells the others why. Raises RecipeError if they cannot be reached.
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
        # The process that hosts the store must leave last.
        dist.barrier()
    except TeamError:
        # Another process is at fault, and the others detect that themselves.
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
