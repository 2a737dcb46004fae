"""Hidden states on disk are those in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shiftadd_cli.blockwise.hidden_states import HiddenStates
from shiftadd_cli.blockwise.stored_states import StoredStates
from shiftadd_cli.errors import OutputError, ResumeError

BATCH = 3


def batches(seed: int, samples: int = 8, dtype: torch.dtype = torch.bfloat16, width: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 4, width, generator=generator).to(dtype).split(BATCH)


def memory_and_disk(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[HiddenStates, StoredStates]:
    memory, disk = HiddenStates(8, BATCH), StoredStates(folder / "states", 8, BATCH)
    for batch in batches(0, dtype=dtype):
        memory.append(batch)
        disk.append(batch)
    return memory, disk


def assert_alike(one: HiddenStates, other: HiddenStates) -> None:
    assert len(one) == len(other)
    assert one.nbytes == other.nbytes
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(torch.equal(one[index], other[index]) for index in range(len(one)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_states_are_appended_and_replaced_as_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    memory, disk = memory_and_disk(tmp_path, dtype)
    assert_alike(disk, memory)
    # Another width, since a block's output may be wider than its input.
    for index, batch in enumerate(batches(1, dtype=dtype, width=7)):
        memory.replace(index, batch)
        disk.replace(index, batch)
        assert_alike(disk, memory)
    disk.turn()
    assert_alike(disk, memory)
    with pytest.raises(IndexError):
        disk[3]


def test_reopened_states_are_unchanged(tmp_path: Path) -> None:
    _, disk = memory_and_disk(tmp_path)
    for index, batch in enumerate(batches(1)):
        disk.replace(index, batch)
    disk.turn()
    file, sums = disk.sync()
    assert file == "quantized-00001.safetensors"
    reopened = StoredStates.reopen(tmp_path / "states", 8, BATCH, "quantized", 1, file, sums)
    assert_alike(reopened, disk)
    assert torch.equal(load_file(tmp_path / "states" / file)["hidden_states"], torch.cat(batches(1)))
    for arguments in ((8, 2), (7, BATCH)):
        with pytest.raises(ResumeError, match="damaged"):
            StoredStates.reopen(tmp_path / "states", *arguments, "quantized", 1, file, sums)
    with pytest.raises(ResumeError, match="checksum"):
        StoredStates.reopen(tmp_path / "states", 8, BATCH, "quantized", 1, file, [*sums[:2], 1])
    path = tmp_path / "states" / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ResumeError, match="damaged"):
        StoredStates.reopen(tmp_path / "states", 8, BATCH, "quantized", 1, file, sums)
    path.unlink()
    with pytest.raises(ResumeError, match="damaged"):
        StoredStates.reopen(tmp_path / "states", 8, BATCH, "quantized", 1, file, sums)


def test_states_cannot_turn_before_the_block_is_finished(tmp_path: Path) -> None:
    _, disk = memory_and_disk(tmp_path)
    disk.replace(0, batches(1)[0])
    with pytest.raises(AssertionError):
        disk.turn()


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    _, disk = memory_and_disk(tmp_path)
    path = tmp_path / "states" / "quantized-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(disk[0], batches(0)[0])
    with pytest.raises(OutputError, match=r"quantized-00000\.safetensors, which this run wrote, cannot be read"):
        disk[2]


def test_batches_of_other_shapes_or_types_are_refused(tmp_path: Path) -> None:
    _, disk = memory_and_disk(tmp_path)
    disk.replace(0, batches(1)[0])
    with pytest.raises(ValueError, match="hidden states are"):
        disk.replace(1, batches(1)[1].float())
    with pytest.raises(ValueError, match="hidden states are"):
        disk.replace(1, batches(1, width=6)[1])
