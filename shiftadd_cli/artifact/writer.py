"""Writes a checkpoint folder that either appears complete or not at all, holding no more than one tensor in memory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shiftadd_cli.artifact.output import refusals
from shiftadd_cli.artifact.shards import INDEX_FILE, Shard, TensorShape, plan_shards

DEFAULT_SHARD_BYTES = 2_000_000_000
_HASH_CHUNK = 1 << 20


class ArtifactWriter:
    """Builds a checkpoint in a hidden folder beside `out` and renames it to `out` in `finish`.

        with ArtifactWriter(out, overwrite=False) as writer:
            writer.plan({"lm_head.weight": ((49152, 576), torch.bfloat16), ...})
            writer.add("lm_head.weight", tensor)        # in any order, each written at once
            writer.add_file("tokenizer.json", text)
            writer.finish(config, report)

    Leaving the block without `finish` (an error, an interrupt) removes the hidden folder; an existing `out` stays as
    it was until the final rename. Bytes depend only on what is added, and on the order of the plan. Space for all
    tensors is reserved by `plan`, so a full disk shows before the work and not after it. Everything the system
    refuses raises OutputError.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self.out = out.resolve()
        self.overwrite = overwrite
        self.shard_bytes = shard_bytes
        self.folder = self.out.parent / f".{self.out.name}.partial-{os.getpid()}"
        self._shards: list[Shard] = []
        self._open: dict[str, BinaryIO] = {}
        self._where: dict[str, Shard] = {}
        self._missing: set[str] = set()
        self._created: list[Path] = []

    def __enter__(self) -> ArtifactWriter:
        self._created = [folder for folder in self.out.parents if not folder.exists()]
        with refusals(self.out):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in self._created:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()

    def plan(self, tensors: Mapping[str, TensorShape]) -> None:
        """Fix the shape and dtype of every tensor, and reserve the space."""
        if self._shards:
            raise RuntimeError("plan() was called before")
        self._shards = plan_shards(tensors, self.shard_bytes)
        self._where = {name: shard for shard in self._shards for name in shard.entries}
        self._missing = set(self._where)
        for shard in self._shards:
            path = self.folder / shard.name
            with refusals(path):
                file = self._open[shard.name] = path.open("wb+", buffering=0)
                _reserve(file, shard.nbytes)
                _write(file, memoryview(shard.header))

    @property
    def nbytes(self) -> int:
        """Size of all planned weight files, headers included."""
        return sum(shard.nbytes for shard in self._shards)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one planned tensor; ValueError if it is not planned, already there, or of another shape or dtype."""
        if name not in self._missing:
            raise ValueError(f"{name} is {'already written' if name in self._where else 'not planned'}")
        shard = self._where[name]
        entry = shard.entries[name]
        if (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {entry.dtype} {entry.shape}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with refusals(self.folder / shard.name):
            self._open[shard.name].seek(entry.start)
            _write(self._open[shard.name], data.data)
        self._missing.discard(name)

    def add_file(self, name: str, content: bytes | str) -> None:
        """Write a small file; text as UTF-8. Files may also be put into `self.folder` directly."""
        path = self.folder / name
        with refusals(path):
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def seal(self) -> dict[str, dict[str, Any]]:
        """Close the tensors' files; returns {file: {"bytes", "sha256"}} of each. RuntimeError if tensors lack."""
        if self._missing or not self._shards:
            raise RuntimeError(f"{len(self._missing)} planned tensors were not added: {sorted(self._missing)[:3]}")
        self._close()
        sums = {}
        for shard in self._shards:
            path = self.folder / shard.name
            with refusals(path):
                sums[shard.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        return sums

    def finish(self, config: Mapping[str, Any], report: Mapping[str, Any] | None = None) -> Path:
        """Write config.json, the index and report.json (with `files` of `seal` added), and put the folder in place."""
        sums = self.seal()
        if len(self._shards) > 1:
            total = sum(e.stop - e.start for shard in self._shards for e in shard.entries.values())
            index = {"metadata": {"total_size": total}, "weight_map": {n: s.name for n, s in self._where.items()}}
            self.add_file(INDEX_FILE, _json(index))
        if report is not None:
            self.add_file("report.json", _json({**report, "files": sums}))
        self.add_file("config.json", _json(config))
        with refusals(self.out):
            for path in self.folder.rglob("*"):
                if path.is_file():
                    _sync(path)
            _sync(self.folder)
            self._swap()
            _sync(self.out.parent)
        return self.out

    def _swap(self) -> None:
        """Rename the finished folder to `out`; an old one goes only when the new one is in its place."""
        if not self.out.exists() or not any(self.out.iterdir()):
            os.rename(self.folder, self.out)
            return
        if not self.overwrite:
            raise FileExistsError(f"{self.out} appeared meanwhile")
        old = self.out.parent / f".{self.out.name}.old-{os.getpid()}"
        os.rename(self.out, old)
        try:
            os.rename(self.folder, self.out)
        except BaseException:
            os.rename(old, self.out)
            raise
        shutil.rmtree(old)

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


def _reserve(file: BinaryIO, size: int) -> None:
    # Without posix_fallocate (macOS, some file systems) the file is sparse, and a full disk shows on writing.
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as failure:
            if failure.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    file.truncate(size)


def _write(file: BinaryIO, data: memoryview) -> None:
    """Write all of `data`: an unbuffered file may take less than it is given."""
    while data:
        data = data[file.write(data) :]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
