"""The counted parts add up to the bytes of the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from artifacts import COMMON, write_checkpoint
from formats import matrix_format
from tiny_models import FAMILIES, tiny_model

from shiftadd_cli.artifact.contents import Contents
from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.bcq.weight import PackedLayout


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_stored_is_counted_once(family: str, tables: bool, tmp_path: Path) -> None:
    model = tiny_model(family)
    folder, _ = write_checkpoint(model, tmp_path / "out", tables=tables)
    contents = Contents.of(Artifact.open(folder))
    headers = 0
    for path in folder.glob("*.safetensors"):
        headers += 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert contents.packed_bytes + contents.table_bytes + contents.kept_bytes + headers == contents.file_bytes
    assert bool(contents.tables) == tables
    rows = sum(table.weights for table in contents.tables)
    assert contents.table_bytes == rows + 2 * sum(table.rows for table in contents.tables)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert contents.packed_weights + rows + sum(module.stored_bytes // 4 for module in contents.kept) == parameters
    assert contents.file_bits_per_weight == pytest.approx(8 * contents.file_bytes / parameters)


def test_kinds_group_similar_layers(tmp_path: Path) -> None:
    own = {"1.mlp.up_proj": matrix_format(5, 8, 1, "pot", True, True)}
    contents = Contents.of(Artifact.open(write_checkpoint(tiny_model("qwen3"), tmp_path / "out", own=own).folder))
    kinds = [kind for kind in contents.kinds if kind.name == "model.layers.*.mlp.up_proj"]
    assert [(kind.count, kind.bits, kind.scale_format) for kind in kinds] == [(2, 3, "apot2"), (1, 5, "pot")]
    assert sum(kind.stored_bytes for kind in contents.kinds) == contents.packed_bytes
    assert sum(kind.stored_bytes for kind in contents.kept_kinds) == contents.kept_bytes
    assert sum(kind.count for kind in contents.kinds) == len(contents.layers) == 3 * 7
    layout = PackedLayout(COMMON, 72, 32)
    assert kinds[0].stored_bytes == 2 * layout.nbytes


def test_contents_become_plain_json(tmp_path: Path) -> None:
    contents = Contents.of(Artifact.open(write_checkpoint(tiny_model("gpt2"), tmp_path / "out").folder))
    values = json.loads(json.dumps(contents.to_dict()))
    assert values["packed_bytes"] == sum(layer["stored_bytes"] for layer in values["layers"])
    assert {layer["name"] for layer in values["layers"]} >= {
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.mlp.c_proj",
    }
