"""Damaged headers and files: always one sentence, never a crash, and never a silently wrong table."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source.safetensors_header import read_header

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.zeros(4, dtype=torch.bfloat16),
    "c": torch.zeros(0, 5, dtype=torch.int64),
    "d": torch.tensor(True),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "w.safetensors", metadata={"format": "pt"})
    return tmp_path / "w.safetensors"


def _write(path: Path, header: Any, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def _entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_sound_file_is_read(file: Path) -> None:
    headers, raw = read_header(file)
    assert {name: (tuple(value.shape), value.dtype) for name, value in TENSORS.items()} == {
        name: (header.shape, header.dtype) for name, header in headers.items()
    }
    assert raw in file.read_bytes()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{not json", b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        ([1, 2], b"", "not a table"),
        ({"a": 3}, b"", "entry of tensor a is not complete"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "entry of tensor a is not complete"),
        ({"a": _entry(offsets=(0,))}, b"", "entry of tensor a is not complete"),
        ({"a": _entry(shape=(-2,))}, bytes(8), "not counts"),
        ({"a": _entry(shape=(2.0,))}, bytes(8), "not counts"),
        ({"a": _entry(offsets=(-8, 0))}, bytes(8), "not counts"),
        ({"a": _entry(dtype="F4")}, bytes(8), "stored as F4, which is not supported; convert"),
        ({"a": _entry(shape=(3,))}, bytes(8), r"tensor a of shape \[3\] \(F32\) is given 8 bytes"),
        ({"a": _entry(), "b": _entry(offsets=(4, 12))}, bytes(12), "does not start where the one before it ends"),
        ({"a": _entry(offsets=(4, 12))}, bytes(12), "does not start where"),
        ({"a": _entry()}, bytes(7), "cut off: 8 bytes of tensors are declared, 7 are there"),
        ({"a": _entry()}, bytes(9), "1 bytes follow the last tensor"),
    ],
)
def test_damage_is_named(header: Any, data: bytes, message: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "w.safetensors", header, data)
    with pytest.raises(SourceError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x01\x02", struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_file_too_short_for_its_header_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=r"is damaged: .*download or copy the file again"):
        read_header(tmp_path / "w.safetensors")


def test_git_lfs_pointer_says_how_to_get_the_file(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(SourceError, match="git lfs pull"):
        read_header(tmp_path / "w.safetensors")


def test_every_truncation_is_refused(file: Path) -> None:
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(SourceError):
            read_header(file)


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_header_byte_is_refused_or_gives_a_sound_table(file: Path, position: int, value: int) -> None:
    """The reference reader must accept whatever we accept, with the same names and shapes."""
    save_file(TENSORS, file, metadata={"format": "pt"})
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    content[position % (8 + length)] = value
    file.write_bytes(content)
    try:
        headers, _ = read_header(file)
    except SourceError:
        return
    try:
        with safe_open(file, framework="pt") as reference:
            names = list(reference.keys())
            shapes = {name: tuple(reference.get_slice(name).get_shape()) for name in names}
    except SafetensorError:
        # The reference is stricter about the free text beside the tensors, which we do not read.
        (length,) = struct.unpack("<Q", content[:8])
        sizes = [prod(header.shape) * header.dtype.itemsize for header in headers.values() if header.dtype is not None]
        assert sum(sizes) == len(content) - 8 - length
        return
    assert shapes == {name: header.shape for name, header in headers.items()}
