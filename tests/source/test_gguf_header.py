"""GGUF headers against gguf's own reader, and damaged files."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
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
    content, end = original.read_bytes(), len(read_gguf_header(original).headers[original])
    for length in (0, 3, 10, 24, end // 2, end - 1, end, (end + len(content)) // 2, len(content) - 1):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(SourceError, match=r"cut\.gguf is damaged: .*; download or copy the file again\."):
            open_source(str(tmp_path / "cut.gguf"))


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("This is not a GGUF file, despite its name.")
    with pytest.raises(SourceError, match="GGUF magic"):
        open_source(str(tmp_path / "text.gguf"))


@given(position=st.integers(0, 100_000), value=st.integers(0, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_byte_never_crashes_the_header(original: Path, tmp_path: Path, position: int, value: int) -> None:
    content = bytearray(original.read_bytes())
    content[position % len(read_gguf_header(original).headers[original])] = value
    (tmp_path / "changed.gguf").write_bytes(content)
    try:
        header = read_gguf_header(tmp_path / "changed.gguf")
    except SourceError:
        return
    assert all(0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(content) for tensor in header.tensors)


def _parts(folder: Path, *, seed: int = 0) -> list[Path]:
    folder.mkdir(exist_ok=True)
    save_tiny_gguf(folder / "tiny.gguf", kind="F16", seed=seed, tensors_a_part=8)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("opened", [0, 2])
def test_missing_part_is_named(opened: int, tmp_path: Path) -> None:
    parts = _parts(tmp_path)
    parts[1].unlink()
    cure = rf"llama-gguf-split --merge {parts[0].name} tiny\.gguf"
    with pytest.raises(SourceError, match=rf"{parts[opened].name} is one of 3 .*{parts[1].name} is not .*{cure}"):
        open_source(str(parts[opened]))


def test_renamed_part_is_refused(tmp_path: Path) -> None:
    parts = _parts(tmp_path)
    moved = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(SourceError, match=r"model\.gguf is one of 3 parts of a model but not named as one"):
        open_source(str(moved))


def test_parts_of_two_models_are_refused(tmp_path: Path) -> None:
    parts = _parts(tmp_path)
    content = parts[1].read_bytes()
    parts[2].write_bytes(content)
    with pytest.raises(SourceError, match="are not from one model"):
        open_source(str(parts[0]))


@pytest.mark.parametrize(
    ("architecture", "kind", "tensors", "description"),
    [
        ("", "imatrix", 1, "an importance matrix"),
        ("llama", "adapter", 1, "an adapter"),
        ("clip", "mmproj", 1, "the projector of a vision-language model"),
        ("clip", "", 1, "the projector of a vision-language model"),
        ("controlvector", "", 1, "a control vector"),
        ("llama", "", 0, "a vocabulary and no weights"),
    ],
)
def test_file_that_is_not_a_model_is_described(
    architecture: str, kind: str, tensors: int, description: str, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", architecture)
    if kind:
        writer.add_type(kind)
    writer.add_token_list(["a", "b"])
    for index in range(tensors):
        writer.add_tensor(f"blk.{index}.weight", np.ones(4, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(SourceError, match=rf"other\.gguf holds {description} and is not a model"):
        open_source(str(tmp_path / "other.gguf"))


def test_file_without_an_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    del writer.kv_data[0]["general.architecture"]
    writer.add_tensor("blk.0.weight", np.ones(4, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(SourceError, match=r"other\.gguf is damaged: .*general\.architecture"):
        open_source(str(tmp_path / "other.gguf"))
