"""Teams of processes as torchrun starts them; some of the processes fail."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Imports once, and forks from there.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        "team_runs",
        "stopped_runs",
        "shiftadd_cli.cli.quantize",
        "shiftadd_cli.pipeline.job",
        "shiftadd_cli.distributed.torch_team",
        "transformers.models.llama.modeling_llama",
    ]
)


def team(size: int, target: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Start `target(rank, *arguments)` in `size` connected processes, without waiting for them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    members = [_PROCESSES.Process(target=_member, args=(target, rank, size, port, *arguments)) for rank in range(size)]
    for member in members:
        member.start()
    return members


def codes(members: Sequence[Any], lost: Sequence[int] = ()) -> list[int]:
    """Exit codes when all have ended, negative for a signal; ranks in `lost` are killed after the others."""
    end = time.monotonic() + 120
    for rank, member in enumerate(members):
        if rank not in lost:
            member.join(max(0.0, end - time.monotonic()))
    for member in members:
        if member.is_alive():
            member.kill()
        member.join()
    return [member.exitcode for member in members]


def results(size: int, target: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of `target(team, *arguments)` in each of `size` processes."""
    queue = _PROCESSES.SimpleQueue()
    members = team(size, _return, queue, target, *arguments)
    by_rank = dict(queue.get() for _ in members)
    assert codes(members) == [0] * size
    return [by_rank[rank] for rank in range(size)]


def _return(rank: int, queue: Any, target: Callable[..., Any], *arguments: Any) -> None:
    from shiftadd_cli.distributed.launch import join_team

    try:
        with join_team(30) as joined:
            queue.put((rank, target(joined, *arguments)))
    except BaseException as failure:
        queue.put((rank, failure))
        raise


def _member(target: Callable[..., Any], rank: int, size: int, port: int, *arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    target(rank, *arguments)


def command(rank: int, log: Path, arguments: Sequence[str], faults: dict[int, str] | None = None) -> None:
    """Run the command `shiftadd` in this process; its output goes to `log` plus the rank.

    faults: by rank, the name of a signal that the process sends itself before its second block, or `hang`.
    """
    from shiftadd_cli.cli import main
    from shiftadd_cli.pipeline.run import Run

    stream = os.open(log.with_name(f"{log.name}{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    # A cache of its own, or the next run would reuse measurements of this one.
    os.environ["SHIFTADD_CACHE"] = str(log.with_name("cache"))
    fault = (faults or {}).get(rank)
    quantize = Run.quantize_block

    def faulty(self: Run, depth: int, name: str) -> Any:
        if depth == 1 and fault == "hang":
            time.sleep(1000)
        elif depth == 1 and fault is not None:
            os.kill(os.getpid(), getattr(signal, fault))
        return quantize(self, depth, name)

    Run.quantize_block = faulty  # type: ignore[method-assign]
    try:
        main([*map(str, arguments)])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
