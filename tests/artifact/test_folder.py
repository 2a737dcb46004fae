"""Checkpoints are opened with all their parts, and other folders are refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from artifacts import write_checkpoint
from tiny_models import save_tiny, tiny_model

from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.errors import ArtifactError


@pytest.mark.parametrize("shard_bytes", [20_000, 10**9])
def test_all_tensors_are_found_in_one_file_or_many(tmp_path: Path, shard_bytes: int) -> None:
    folder, _ = write_checkpoint(tiny_model("qwen2"), tmp_path / "out", shard_bytes=shard_bytes)
    artifact = Artifact.open(folder)
    assert (artifact.index is None) == (shard_bytes == 10**9)
    assert artifact.file_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for module, layout in artifact.layouts.items():
        for suffix, shape in layout.tensors().items():
            assert artifact.tensors[f"{module}.{suffix}"] == shape
    assert artifact.report is not None
    assert artifact.report["schema_version"] == 1


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a folder"):
        Artifact.open(tmp_path / "gone")
    with pytest.raises(ArtifactError, match=r"has no config\.json"):
        Artifact.open(tmp_path)
    with pytest.raises(ArtifactError, match="not compressed by shiftadd"):
        Artifact.open(save_tiny("llama", tmp_path / "dense"))
    for content in ("{", "[]", "\udcff"):
        (tmp_path / "config.json").write_text(content, errors="surrogateescape")
        with pytest.raises(ArtifactError, match=r"config\.json"):
            Artifact.open(tmp_path)


@pytest.mark.parametrize("names", [None, [], {"a": 3}, {"a": "../../etc/x.safetensors"}, {"a": "/x.safetensors"}])
def test_an_index_that_is_malformed_or_leads_elsewhere_is_refused(tmp_path: Path, names: object) -> None:
    folder, _ = write_checkpoint(tiny_model("qwen2"), tmp_path / "out")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ArtifactError, match="no table of tensors and files"):
        _ = Artifact.open(folder).headers
