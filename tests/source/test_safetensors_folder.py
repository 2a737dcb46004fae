"""Shards, indexes, and folders that hold something else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import open_source
from shiftadd_cli.source.safetensors_folder import SafetensorsFolder, read_index
from shiftadd_cli.storage.safetensors_names import INDEX_FILE


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model", sharded=True)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def _change_index(folder: Path, name: str, shard: object) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"][name] = shard
    (folder / INDEX_FILE).write_text(json.dumps(index))


def _fingerprint(folder: Path) -> str:
    return open_source(str(folder)).fingerprint


def test_shards_are_one_checkpoint(sharded: Path, tmp_path: Path) -> None:
    single = save_tiny("llama", tmp_path / "single")
    stored = load_file(single / "model.safetensors")
    files = SafetensorsFolder(sharded)
    assert list(files.files) == _shards(sharded)
    assert len(files.files) > 3
    assert {name: header.shape for name, header in files.tensors.items()} == {
        n: tuple(v.shape) for n, v in stored.items()
    }
    with files.opened(list(stored)) as lazy:
        assert all(torch.equal(lazy[name][...], value) for name, value in stored.items())


def test_missing_shard_is_named(sharded: Path) -> None:
    _shards(sharded)[1].unlink()
    with pytest.raises(SourceError, match=r"model-00002-of-\d+\.safetensors that the index names is missing"):
        open_source(str(sharded))


def test_every_shard_is_checked_to_its_end(sharded: Path) -> None:
    last = _shards(sharded)[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(SourceError, match=f"{last.name} is damaged: it is cut off"):
        open_source(str(sharded))


def test_tensor_missing_from_its_listed_shard_is_named(sharded: Path) -> None:
    _change_index(sharded, "model.norm.weight", _shards(sharded)[0].name)
    with pytest.raises(SourceError, match=r"lacks 1 tensors .* \(first: model\.norm\.weight\)"):
        open_source(str(sharded))


@pytest.mark.parametrize(
    "shard",
    ["../w.safetensors", "/etc/passwd", "a/../../w.safetensors", "..\\w.safetensors", "C:\\w.safetensors", "w\0"],
)
def test_index_must_stay_in_its_folder(shard: str, sharded: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(48)}, sharded.parent / "w.safetensors")
    _change_index(sharded, "model.norm.weight", shard)
    with pytest.raises(SourceError, match="names a file outside its folder"):
        open_source(str(sharded))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": 5}']
)
def test_invalid_index_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(SourceError, match=f"{INDEX_FILE}.*download it again"):
        read_index(tmp_path / INDEX_FILE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"),
        ("model-Q4_0.gguf", r"to read model-Q4_0\.gguf, give the path of that file"),
        ("notes.md", r"holds no weights: neither model\.safetensors nor"),
    ],
)
def test_folder_with_other_weights_or_none_is_refused(name: str, message: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path))


def test_fingerprint_depends_on_content_not_on_location(tmp_path: Path) -> None:
    first = _fingerprint(save_tiny("llama", tmp_path / "one"))
    assert len(first) == hashlib.sha256().digest_size * 2
    assert _fingerprint(save_tiny("llama", tmp_path / "two")) == first
    assert _fingerprint(save_tiny("llama", tmp_path / "other-seed", seed=1)) != first
    assert _fingerprint(save_tiny("llama", tmp_path / "shards", sharded=True)) != first
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    (tmp_path / "two" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert _fingerprint(tmp_path / "two") != first


def test_stored_dtype_is_that_of_most_numbers(tmp_path: Path) -> None:
    save_file(
        {"a": torch.zeros(9, dtype=torch.float16), "b": torch.zeros(4), "c": torch.zeros(99, dtype=torch.int32)},
        tmp_path / "model.safetensors",
    )
    assert SafetensorsFolder(tmp_path).stored_dtype == torch.float16


def _stray(sharded: Path, change: float) -> Path:
    """Write a single file beside the shards, as an earlier save may have left it."""
    stored = {name: value for shard in _shards(sharded) for name, value in load_file(shard).items()}
    stored["model.norm.weight"] = stored["model.norm.weight"] + change
    save_file(stored, sharded / "model.safetensors", metadata={"format": "pt"})
    return sharded


def test_single_file_that_differs_from_the_shards_is_refused(sharded: Path) -> None:
    with pytest.raises(SourceError, match=r"holds model\.safetensors and, with other content, the shards"):
        open_source(str(_stray(sharded, 1e-3)))


def test_single_file_with_other_tensors_than_the_shards_is_refused(sharded: Path) -> None:
    save_file({"model.norm.weight": torch.ones(48)}, sharded / "model.safetensors")
    with pytest.raises(SourceError, match="with other content"):
        open_source(str(sharded))


def test_single_file_equal_to_the_shards_is_accepted(sharded: Path) -> None:
    before = _fingerprint(sharded)
    assert _fingerprint(_stray(sharded, 0.0)) == before


def test_index_without_its_shards_is_ignored(sharded: Path) -> None:
    _stray(sharded, 0.0)
    for shard in _shards(sharded):
        shard.unlink()
    assert [file.name for file in SafetensorsFolder(sharded).files] == ["model.safetensors"]


def test_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = _shards(sharded)[:2]
    save_file(load_file(first) | dict([next(iter(load_file(second).items()))]), first)
    with pytest.raises(SourceError, match=rf"is in .*{first.name} and in .*{second.name}"):
        open_source(str(sharded))


def test_tensor_that_the_index_does_not_list_is_left_behind(sharded: Path) -> None:
    shard = _shards(sharded)[0]
    save_file(load_file(shard) | {"extra": torch.ones(5)}, shard)
    assert [(entry.part, entry.nbytes) for entry in open_source(str(sharded)).left_behind] == [("extra", 20)]
