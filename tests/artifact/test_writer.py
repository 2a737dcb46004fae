"""The writer: complete or nothing, readable by the library, the same bytes every time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from shiftadd_cli.artifact import writer as writer_module
from shiftadd_cli.artifact.workspace import Workspace
from shiftadd_cli.artifact.writer import ArtifactWriter, sha256
from shiftadd_cli.errors import OutputError
from shiftadd_cli.storage.safetensors_names import INDEX_FILE

TENSORS = {
    "embed": torch.randn(7, 5, dtype=torch.bfloat16),
    "codes": torch.randint(0, 256, (9, 3, 5), dtype=torch.uint8),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "transposed": torch.randn(6, 11).T,
    "halves": torch.randn(13).half(),
}
CONFIG = {"model_type": "llama", "quantization_config": {"quant_method": "shiftadd"}}


def write(out: Path, *, shard_bytes: int = 10**9, order: list[str] | None = None, overwrite: bool = False) -> Path:
    with ArtifactWriter(out, overwrite=overwrite, shard_bytes=shard_bytes) as writer:
        writer.plan({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()})
        for name in order or list(TENSORS):
            writer.add(name, TENSORS[name])
        writer.add_file("tokenizer.json", "{}")
        return writer.finish(CONFIG, {"schema_version": 1})


@pytest.mark.parametrize("shard_bytes", [1, 100, 200, 10**9])
def test_the_library_reads_every_added_tensor(tmp_path: Path, shard_bytes: int) -> None:
    out = write(tmp_path / "out", shard_bytes=shard_bytes)
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        part = load_file(path)
        assert not stored.keys() & part.keys()
        stored |= part
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor)
    if shard_bytes == 10**9:
        assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    else:
        index = json.loads((out / INDEX_FILE).read_text())
        assert all(name in load_file(out / file) for name, file in index["weight_map"].items())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_report_and_config_are_written(tmp_path: Path) -> None:
    out = write(tmp_path / "out", shard_bytes=100)
    assert json.loads((out / "config.json").read_text()) == CONFIG
    report = json.loads((out / "report.json").read_text())
    assert report["schema_version"] == 1
    assert report["files"] == {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in out.glob("*.safetensors")
    }


def test_bytes_depend_neither_on_time_nor_on_order(tmp_path: Path) -> None:
    one = write(tmp_path / "one", shard_bytes=150)
    other = write(tmp_path / "other", shard_bytes=150, order=list(reversed(TENSORS)))
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


def test_output_is_invisible_until_the_end_and_removed_after_an_error(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep" / "out"

    def interrupted() -> None:
        with ArtifactWriter(out) as writer:
            writer.plan({"a": ((3,), torch.float32)})
            writer.add("a", torch.zeros(3))
            assert not out.exists()
            assert (out.parent / ".out.partial").is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tensor_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "x") as writer:
        writer.plan({"a": ((3,), torch.float32), "b": ((), torch.uint8)})
        writer.add("a", torch.zeros(3))
        with pytest.raises(RuntimeError, match="1 planned tensors were not added"):
            writer.finish(CONFIG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shard_bytes", [1, 10**9])
def test_added_tensors_can_be_read_and_replaced(tmp_path: Path, shard_bytes: int) -> None:
    with ArtifactWriter(tmp_path / "out", shard_bytes=shard_bytes) as writer:
        writer.plan({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()})
        with pytest.raises(ValueError, match="scalar was not added"):
            writer.read("scalar")
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
            assert torch.equal(writer.read(name), tensor)
        writer.withdraw(["scalar", "halves"])
        with pytest.raises(ValueError, match="scalar was not added"):
            writer.read("scalar")
        writer.add("scalar", torch.tensor(1.25))
        with pytest.raises(RuntimeError, match="halves"):
            writer.seal()
        writer.add("halves", TENSORS["halves"])
        writer.finish(CONFIG)
    stored: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(path)
    for name, tensor in (TENSORS | {"scalar": torch.tensor(1.25)}).items():
        assert torch.equal(stored[name], tensor)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b", torch.zeros(3), "b is not planned"),
        ("a", torch.zeros(4), r"not torch.float32 \(3,\)"),
        ("a", torch.zeros(3, dtype=torch.float64), "a is torch.float64"),
    ],
)
def test_unplanned_tensors_are_refused(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    with ArtifactWriter(tmp_path / "x") as writer:
        writer.plan({"a": ((3,), torch.float32)})
        with pytest.raises(ValueError, match=message):
            writer.add(name, tensor)
        writer.add("a", torch.zeros(3))
        with pytest.raises(ValueError, match="already written"):
            writer.add("a", torch.zeros(3))


def test_overwriting_swaps_the_whole_folder(tmp_path: Path) -> None:
    out = write(tmp_path / "out", shard_bytes=100)
    (out / "stale.txt").write_text("old")
    write(out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "report.json",
        "tokenizer.json",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_survives_failures_up_to_the_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OutputError, match="appeared meanwhile"):
        write(out, overwrite=False)
    rename = os.rename

    def refuse(old: Path, new: Path) -> None:
        if Path(old).name in refused:
            raise OSError(errno.EIO, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse)
    refused = ["artifact"]
    with pytest.raises(OutputError, match="Input/output error"):
        write(out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    refused = ["artifact", "old"]
    with pytest.raises(OutputError, match="Input/output error"):
        write(out, overwrite=True)
    assert not out.exists()
    monkeypatch.undo()
    with Workspace(out):
        pass
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FULL = """
import sys, torch, resource, pathlib
from shiftadd_cli.artifact.writer import ArtifactWriter
from shiftadd_cli.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    with ArtifactWriter(pathlib.Path(sys.argv[1])) as writer:
        writer.plan({"a": ((int(sys.argv[2]),), torch.uint8)})
        writer.add("a", torch.zeros(int(sys.argv[2]), dtype=torch.uint8))
        writer.add_file("tokenizer.json", "x" * int(sys.argv[3]))
        writer.finish({})
except OutputError as failure:
    print(failure)
"""


@pytest.mark.parametrize(("tensor", "extra"), [(100_000, 10), (1000, 100_000)])
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, tensor: int, extra: int) -> None:
    """A limit on file sizes fails in the system's own calls, as a full disk does."""
    command = [sys.executable, "-c", FULL, str(tmp_path / "out"), str(tensor), str(extra)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("No space left to write")
    assert "free some space" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_when_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module.os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match="No space left"), ArtifactWriter(tmp_path / "out") as writer:
        writer.plan({"a": ((5,), torch.uint8)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [None, errno.EOPNOTSUPP])
def test_file_systems_that_cannot_reserve_space_are_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    def refuse(descriptor: int, offset: int, length: int) -> None:
        raise OSError(number, "not supported")

    if number is None:
        monkeypatch.delattr(writer_module.os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(writer_module.os, "posix_fallocate", refuse, raising=False)
    plain = load_file(write(tmp_path / "out") / "model.safetensors")
    assert all(torch.equal(plain[name], tensor) for name, tensor in TENSORS.items())


STREAM = """
import sys, torch, resource, pathlib
from shiftadd_cli.artifact.writer import ArtifactWriter
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
one = torch.zeros(1 << 21, dtype=torch.uint8)
before = peak()
with ArtifactWriter(pathlib.Path(sys.argv[1])) as writer:
    writer.plan({str(i): ((1 << 21,), torch.uint8) for i in range(100)})
    for i in range(100):
        writer.add(str(i), torch.full((1 << 21,), i, dtype=torch.uint8))
    writer.finish({})
print((peak() - before) * (1 if sys.platform == "darwin" else 1024))
"""


def test_a_shard_is_never_held_in_memory(tmp_path: Path) -> None:
    """A separate process writes 200 MB in tensors of 2 MB."""
    command = [sys.executable, "-c", STREAM, str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(result.stdout) < 40e6
