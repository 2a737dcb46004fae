"""GGUF headers against gguf's own reader, and damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny_gguf

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import open_source
from shiftadd_cli.source.gguf_header import read_gguf_header


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    save_tiny_gguf(path, kind="Q4_1")
    return path


def test_tensors_lie_where_the_reference_reader_finds_them(original: Path) -> None:
    header = read_gguf_header(original)
    reference = {tensor.name: tensor for tensor in GGUFReader(original).tensors}
    assert header.architecture == "llama"
    assert header.stored_dtype is None
    assert {tensor.name for tensor in header.tensors} == reference.keys()
    content = original.read_bytes()
    for tensor in header.tensors:
        other = reference[tensor.name]
        assert tensor.shape == tuple(int(size) for size in reversed(other.shape))
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == other.data.tobytes()


def test_every_kind_of_truncation_is_refused(original: Path, tmp_path: Path) -> None:
    content, end = original.read_bytes(), len(read_gguf_header(original).raw)
    for length in (0, 3, 10, 24, end // 2, end - 1, end, (end + len(content)) // 2, len(content) - 1):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(SourceError, match=r"cut\.gguf is damaged: .*; download or copy the file again\."):
            open_source(str(tmp_path / "cut.gguf"))


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("This is no GGUF file, it only has the name of one.")
    with pytest.raises(SourceError, match="GGUF magic"):
        open_source(str(tmp_path / "text.gguf"))


@given(position=st.integers(0, 100_000), value=st.integers(0, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_never_crashes_the_header(original: Path, tmp_path: Path, position: int, value: int) -> None:
    content = bytearray(original.read_bytes())
    content[position % len(read_gguf_header(original).raw)] = value
    (tmp_path / "changed.gguf").write_bytes(content)
    try:
        header = read_gguf_header(tmp_path / "changed.gguf")
    except SourceError:
        return
    assert all(0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(content) for tensor in header.tensors)
