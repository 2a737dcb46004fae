"""Planned files against the safetensors library, which everyone reads with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shiftadd_cli.artifact.shards import TensorShape, nbytes, plan_shards, read_header
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.storage.safetensors_names import INDEX_FILE, SINGLE_FILE

DTYPES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool, torch.float64]
SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.tuples(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from(DTYPES)),
    max_size=12,
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(SHAPES, st.integers(1, 300))
def test_plans_place_every_tensor_once_aligned_and_within_the_limit(
    tensors: dict[str, TensorShape], limit: int
) -> None:
    shards = plan_shards(tensors, limit)
    placed = [name for shard in shards for name in shard.entries]
    assert sorted(placed) == sorted(tensors)
    for shard in shards:
        position = len(shard.header)
        assert position % 8 == 0
        for name, entry in shard.entries.items():
            assert (entry.shape, entry.dtype) == tensors[name]
            assert entry.start == position
            assert entry.start % entry.dtype.itemsize == 0
            assert entry.stop - entry.start == nbytes(tensors[name])
            position = entry.stop
        assert shard.nbytes == position
        assert shard.nbytes - len(shard.header) <= limit or len(shard.entries) == 1 or not any(
            nbytes(tensors[name]) for name in list(shard.entries)[1:]
        )  # fmt: skip


def test_names_are_those_of_transformers() -> None:
    tensors = {str(i): ((100,), torch.uint8) for i in range(3)}
    assert [shard.name for shard in plan_shards(tensors, 1000)] == [SINGLE_FILE]
    assert [shard.name for shard in plan_shards(tensors, 200)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert INDEX_FILE == "model.safetensors.index.json"


def test_the_header_of_a_library_file_is_read(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.zeros(2, i, dtype=dtype) for i, dtype in enumerate(DTYPES)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors") == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=120))
def test_any_other_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x\.safetensors is truncated or damaged"):
        read_header(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone\.safetensors is missing"):
        read_header(tmp_path / "gone.safetensors")
