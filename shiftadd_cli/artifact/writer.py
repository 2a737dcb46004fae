"""Writes a checkpoint folder that appears complete or not at all, with at most one tensor in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from torch import Tensor

from shiftadd_cli.artifact.shards import Shard, TensorShape, plan_shards
from shiftadd_cli.artifact.workspace import Workspace
from shiftadd_cli.storage.durable import as_bytes, checksum, read_tensor, reserve, write_all, write_tensor
from shiftadd_cli.storage.record_file import damaged
from shiftadd_cli.storage.refusals import refusals
from shiftadd_cli.storage.safetensors_names import INDEX_FILE

DEFAULT_SHARD_BYTES = 2_000_000_000
_HASH_CHUNK = 1 << 20


class ArtifactWriter:
    """Builds a checkpoint in a hidden folder next to `out` and renames it to `out` in `finish`.

        with ArtifactWriter(out, overwrite=False) as writer:
            writer.plan({"lm_head.weight": ((49152, 576), torch.bfloat16), ...})
            writer.add("lm_head.weight", tensor)        # in any order, written at once
            writer.add_file("tokenizer.json", text)
            writer.finish(config, report)

    Leaving the block without `finish` (an error, an interrupt) removes the hidden folder, unless it belongs to
    a `workspace`, which the caller enters and leaves. An existing `out` stays unchanged until the final rename. The
    bytes depend only on the added content and on the order of the plan. `plan` reserves the space for all tensors, so
    a full disk shows before the work and not after it. Raises OutputError if the system refuses to write.
    """

    def __init__(
        self,
        out: Path,
        *,
        overwrite: bool = False,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        workspace: Workspace | None = None,
    ) -> None:
        self._owned = workspace is None
        self.workspace = Workspace(out, resume=False) if workspace is None else workspace
        self.out = self.workspace.out
        self.overwrite = overwrite
        self.shard_bytes = shard_bytes
        self.folder = self.workspace.artifact
        self._shards: list[Shard] = []
        self._open: dict[str, BinaryIO] = {}
        self._where: dict[str, Shard] = {}
        self._missing: set[str] = set()
        # CRC-32 by name of the tensors added since the last `sync`.
        self._fresh: dict[str, int] = {}

    def __enter__(self) -> ArtifactWriter:
        if self._owned:
            self.workspace.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._owned:
            self.workspace.__exit__(kind, value, trace)

    def plan(self, tensors: Mapping[str, TensorShape], written: Mapping[str, int] | None = None) -> None:
        """Fix the shape and dtype of every tensor, and reserve the space.

        written: the tensors that an earlier run added under the same plan, as CRC-32 by name from `sync`. Raises
            ResumeError if they are not there.
        """
        if self._shards:
            raise RuntimeError("plan() was already called")
        self._shards = plan_shards(tensors, self.shard_bytes)
        self._where = {name: shard for shard in self._shards for name in shard.entries}
        self._missing = set(self._where)
        for shard in self._shards:
            path = self.folder / shard.name
            if written is not None:
                self._reopen(path, shard, written)
                continue
            with refusals(path):
                file = self._open[shard.name] = path.open("wb+", buffering=0)
                reserve(file, shard.nbytes)
                write_all(file, memoryview(shard.header))

    def _reopen(self, path: Path, shard: Shard, written: Mapping[str, int]) -> None:
        try:
            file = self._open[shard.name] = path.open("rb+", buffering=0)
            if os.fstat(file.fileno()).st_size != shard.nbytes or file.read(len(shard.header)) != shard.header:
                raise damaged(path, "its layout is not that of this run")
            for name in shard.entries.keys() & written.keys():
                entry = shard.entries[name]
                if checksum(read_tensor(file, entry.start, entry.shape, entry.dtype)) != written[name]:
                    raise damaged(path, f"{name} does not match its checksum")
                self._missing.discard(name)
        except OSError as failure:
            raise damaged(path, failure.strerror or str(failure)) from failure

    @property
    def nbytes(self) -> int:
        """Size of all planned weight files, headers included."""
        return sum(shard.nbytes for shard in self._shards)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one planned tensor; raises ValueError if unplanned, already there, or of another shape or dtype."""
        if name not in self._missing:
            raise ValueError(f"{name} is {'already written' if name in self._where else 'not planned'}")
        shard = self._where[name]
        entry = shard.entries[name]
        if (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {entry.dtype} {entry.shape}")
        with refusals(self.folder / shard.name):
            self._fresh[name] = write_tensor(self._open[shard.name], entry.start, tensor)
        self._missing.discard(name)

    def read(self, name: str) -> Tensor:
        """Read a tensor back; raises ValueError if it was not added."""
        if name not in self._where or name in self._missing:
            raise ValueError(f"{name} was not added")
        shard = self._where[name]
        entry = shard.entries[name]
        with refusals(self.folder / shard.name):
            return read_tensor(self._open[shard.name], entry.start, entry.shape, entry.dtype)

    def withdraw(self, names: Iterable[str]) -> None:
        """Expect these tensors again, whether they were added or not."""
        self._missing |= set(names)

    def sync(self) -> dict[str, int]:
        """Wait until all tensors added since the last call are on disk; returns CRC-32 by name, for `plan`."""
        fresh, self._fresh = self._fresh, {}
        for name in {self._where[tensor].name for tensor in fresh}:
            with refusals(self.folder / name):
                os.fsync(self._open[name].fileno())
        return fresh

    def add_file(self, name: str, content: bytes | str) -> None:
        """Write a small file, text as UTF-8. Files may also be put into `self.folder` directly."""
        path = self.folder / name
        with refusals(path):
            path.write_bytes(as_bytes(content))

    def seal(self) -> dict[str, dict[str, Any]]:
        """Close the weight files; returns {file: {"bytes", "sha256"}}. Raises RuntimeError if tensors are missing."""
        if self._missing or not self._shards:
            raise RuntimeError(f"{len(self._missing)} planned tensors were not added: {sorted(self._missing)[:3]}")
        self._close()
        sums = {}
        for shard in self._shards:
            path = self.folder / shard.name
            with refusals(path):
                sums[shard.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        return sums

    def finish(
        self,
        config: Mapping[str, Any],
        report: Mapping[str, Any] | None = None,
        check: Callable[[Path], object] = lambda folder: None,
    ) -> Path:
        """Write config.json, the index and report.json (with `files` from `seal` added), and put the folder in place.

        check: called with the complete folder just before that; an exception from it stops the move.
        """
        sums = self.seal()
        if len(self._shards) > 1:
            total = sum(e.stop - e.start for shard in self._shards for e in shard.entries.values())
            index = {"metadata": {"total_size": total}, "weight_map": {n: s.name for n, s in self._where.items()}}
            self.add_file(INDEX_FILE, _json(index))
        if report is not None:
            self.add_file("report.json", _json({**report, "files": sums}))
        self.add_file("config.json", _json(config))
        check(self.folder)
        self.workspace.publish(overwrite=self.overwrite)
        return self.out

    def _close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
