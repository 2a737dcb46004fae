"""Durable writes: reported data is complete and on disk, even after a kill or a power cut."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor


def reserve(file: BinaryIO, size: int) -> None:
    """Set `file` to `size` bytes, reserved where the system can, so that a full disk shows now."""
    # Without posix_fallocate (macOS, some file systems) the file is sparse, and a full disk shows only on writing.
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as failure:
            if failure.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    file.truncate(size)


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Write all of `data`; one call of an unbuffered file may accept only part of it."""
    while data:
        data = data[file.write(data) :]


def write_tensor(file: BinaryIO, start: int, tensor: Tensor) -> int:
    """Write a tensor's bytes at position `start` and return their CRC-32."""
    return zlib.crc32(put_tensor(file, start, tensor))


def put_tensor(file: BinaryIO, start: int, tensor: Tensor) -> memoryview:
    """Write a tensor's bytes at position `start` and return them."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    file.seek(start)
    write_all(file, data)
    return data


def read_tensor(file: BinaryIO, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Read a tensor from position `start`; raises OSError if the file ends too early.

    The file is read, not mapped, because mapped pages count as memory of the process.
    """
    tensor = torch.empty(shape, dtype=dtype)
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    file.seek(start)
    while data:
        read = file.readinto(data)  # type: ignore[attr-defined]
        if not read:
            raise OSError(errno.EIO, "the file was cut off", getattr(file, "name", None))
        data = data[read:]
    return tensor


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def as_bytes(content: bytes | str) -> bytes:
    """Text as UTF-8. Parts of file names that are not valid UTF-8 become escapes, which JSON reads back, so that no
    result is lost over them."""
    return content.encode(errors="backslashreplace") if isinstance(content, str) else content


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file that ends up complete and on disk, or not at all."""
    new = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        new.write_bytes(content)
        sync(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
