"""A team of processes that torchrun started, connected by torch.distributed.

Tensors are sent as the bytes of a safetensors file, so that received data is never unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from shiftadd_cli.distributed.parallel import map_pieces
from shiftadd_cli.distributed.team import T, Team, Tensors
from shiftadd_cli.distributed.watch import Watch
from shiftadd_cli.errors import TeamError, first_line

_ONLY = "tensor"


class TorchTeam(Team):
    """Process `rank` of `size` in the initialised process group. A failed exchange raises TeamError, which names the
    process at fault."""

    def __init__(self, rank: int, size: int, watch: Watch) -> None:
        self.rank, self.size, self.watch = rank, size, watch

    def fault(self) -> str | None:
        return self.watch.reason()

    def share(self, value: T) -> T:
        shared: T = json.loads(self._broadcast(json.dumps(value).encode() if self.first else None, 0))
        return shared

    def share_tensors(self, tensors: Tensors | None) -> Tensors:
        return load(self._broadcast(_packed(tensors or {}) if self.first else None, 0))

    def gather(self, value: T) -> list[T]:
        return [json.loads(data) for data in self._of_all(json.dumps(value).encode())]

    def exchange(self, mine: Tensors) -> list[Tensors]:
        return [load(data) for data in self._of_all(_packed(mine))]

    def send(self, tensor: Tensor, rank: int) -> None:
        data = _bytes(_packed({_ONLY: tensor}))
        with self._others():
            dist.send(torch.tensor([len(data)]), rank)
            dist.send(data, rank)

    def receive(self, rank: int) -> Tensor:
        length = torch.zeros(1, dtype=torch.int64)
        with self._others():
            dist.recv(length, rank)
            data = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(data, rank)
        return load(data.numpy().tobytes())[_ONLY]

    def add_in_order(self, totals: Sequence[Tensor], parts: Sequence[Tensor] | None, count: int) -> None:
        self.watch.step()
        for index, total in enumerate(totals):
            part = None if parts is None else parts[index]
            for rank, rows in self._rows(total):
                if rank == self.rank:
                    self._add_rows(total[rows], None if part is None else part[rows], count)
                elif part is not None:
                    with self._others():
                        dist.send(part[rows].cpu().contiguous(), rank)

    def _add_rows(self, total: Tensor, own: Tensor | None, count: int) -> None:
        for rank in range(count):
            part = own
            if rank != self.rank:
                part = torch.empty_like(total, device="cpu")
                with self._others():
                    dist.recv(part, rank)
            assert part is not None, "this process has a part"
            total += part.to(total.device)

    def complete(self, totals: Sequence[Tensor]) -> None:
        self.watch.step()
        for total in totals:
            for rank, rows in self._rows(total):
                content = total[rows].cpu()
                with self._others():
                    dist.broadcast(content, rank)
                if rank != self.rank:
                    total[rows] = content

    def wait_for_first(self, work: Callable[[Callable[[], object]], T]) -> T | None:
        if not self.first:
            while self.share(False):
                continue
            return None
        result = work(lambda: self.share(True))
        self.share(False)
        return result

    def map(self, function: Callable[[T], Tensors], pieces: Sequence[T]) -> list[Tensors]:
        mine = range(self.rank, len(pieces), self.size)
        own = map_pieces(function, [pieces[index] for index in mine])
        named = {
            f"{index}.{name}": tensor
            for index, tensors in zip(mine, own, strict=True)
            for name, tensor in tensors.items()
        }
        results: list[Tensors] = [{} for _ in pieces]
        for received in self.exchange(named):
            for name, tensor in received.items():
                index, _, suffix = name.partition(".")
                results[int(index)][suffix] = tensor
        return results

    def _rows(self, total: Tensor) -> Iterator[tuple[int, slice]]:
        """The processes that own rows of a total, with their rows."""
        edges = [rank * len(total) // self.size for rank in range(self.size + 1)]
        for rank, (first, last) in enumerate(pairwise(edges)):
            if first < last:
                yield rank, slice(first, last)

    def _of_all(self, mine: bytes) -> list[bytes]:
        return [self._broadcast(mine if rank == self.rank else None, rank) for rank in range(self.size)]

    def _broadcast(self, data: bytes | None, rank: int) -> bytes:
        self.watch.step()
        content = None if data is None else _bytes(data)
        length = torch.tensor([0 if content is None else len(content)])
        with self._others():
            dist.broadcast(length, rank)
            if content is None:
                content = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(content, rank)
        return content.numpy().tobytes()

    @contextmanager
    def _others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as failure:
            reason = self.fault() or f"The exchange between processes failed ({first_line(failure)})."
            raise TeamError(reason) from failure


def _packed(tensors: Tensors) -> bytes:
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
