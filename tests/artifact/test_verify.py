"""Every kind of damage is found and named; a sound checkpoint passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artifacts import COMMON, FORMATS, edit_config, edit_tensors, write_checkpoint
from formats import matrix_format
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM

from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.verify import verify
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.runtime.transformers_plugin import register

NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint of one file whose checksums are not recorded, so that other checks are reached."""
    folder = write_checkpoint(tiny_model("qwen2"), tmp_path / "out", shard_bytes=10**9).folder
    (folder / "report.json").unlink()
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tiny_model("qwen2"), tmp_path / "out").folder


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        verify(Artifact.open(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_checkpoints_pass(family: str, tmp_path: Path) -> None:
    verify(Artifact.open(write_checkpoint(tiny_model(family), tmp_path / "out").folder))


@pytest.mark.parametrize("form", FORMATS)
def test_sound_checkpoints_of_every_format_pass(form: str, tmp_path: Path) -> None:
    common = matrix_format(2, 7, "1/8", form, False, True)
    verify(Artifact.open(write_checkpoint(tiny_model("llama"), tmp_path / "out", common=common).folder))


@pytest.mark.parametrize("ids", [[0, 1, 48], [-1, 0, 3], [5, 5, 6], [7, 2, 9]])
def test_outlier_columns_must_exist_and_be_in_order(tmp_path: Path, ids: list[int]) -> None:
    common = COMMON.replaced(outlier_columns=0.06)
    folder = write_checkpoint(tiny_model("llama"), tmp_path / "out", common=common, shard_bytes=10**9).folder
    verify(Artifact.open(folder))
    (folder / "report.json").unlink()
    edit_tensors(folder, {f"{NAME}.weight_column_ids": torch.tensor(ids, dtype=torch.int32)})
    refused(folder, "names columns that are not there, or not in order")


def test_a_checkpoint_saved_again_by_transformers_passes(sharded: Path, tmp_path: Path) -> None:
    register()
    AutoModelForCausalLM.from_pretrained(sharded).save_pretrained(tmp_path / "again")
    verify(Artifact.open(tmp_path / "again"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{NAME}.weight_exponents", None, f"{NAME}.weight_exponents is missing"),
        (f"{NAME}.weight_codes", torch.zeros(84, 3, 5, dtype=torch.uint8), r"weight_codes is torch.uint8 \[84, 3, 5\]"),
        (f"{NAME}.weight_row_scale", torch.ones(84), "weight_row_scale is torch.float32"),
        (f"{NAME}.weight_row_scale", torch.full((84,), torch.nan).bfloat16(), "weight_row_scale holds values"),
        (f"{NAME}.weight_row_scale", torch.full((84,), 3e38).bfloat16(), f"{NAME} decodes to weights that are not"),
        (f"{NAME}.weight_offset", torch.zeros(84, 1, dtype=torch.uint8), "weight_offset belongs to no module"),
        (f"{NAME}.weight", torch.zeros(84, 32), f"{NAME}.weight is stored in addition to its compressed form"),
        ("model.layers.9.q_proj.weight_codes", torch.zeros(3, dtype=torch.uint8), "belongs to no module"),
        ("model.norm.weight", torch.full((32,), torch.inf), "model.norm.weight holds values that are not finite"),
    ],
)
def test_faulty_tensors_are_refused(single: Path, name: str, value: torch.Tensor | None, message: str) -> None:
    edit_tensors(single, {name: value})
    refused(single, message)


EMBED = "model.embed_tokens"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_sound_tables_pass(family: str, tmp_path: Path) -> None:
    verify(Artifact.open(write_checkpoint(tiny_model(family), tmp_path / "out", tables=True).folder))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{EMBED}.weight_int8", None, f"{EMBED}.weight_int8 is missing"),
        (f"{EMBED}.weight_int8", torch.zeros(320, 32, dtype=torch.uint8), r"weight_int8 is torch.uint8 \[320, 32\]"),
        (f"{EMBED}.weight_int8_scale", torch.ones(320), "weight_int8_scale is torch.float32"),
        (f"{EMBED}.weight_int8", torch.full((320, 32), -128, dtype=torch.int8), "holds the code -128"),
        (f"{EMBED}.weight_int8_scale", torch.full((320,), torch.nan).bfloat16(), f"{EMBED} decodes to weights that"),
        (f"{EMBED}.weight_int8_scale", torch.full((320,), 3e38).bfloat16(), f"{EMBED} decodes to weights that are not"),
        (f"{EMBED}.weight", torch.zeros(320, 32), f"{EMBED}.weight is stored in addition to its compressed form"),
        ("lm_head.weight_int8", torch.zeros(320, 32, dtype=torch.int8), "lm_head.weight_int8 belongs to no module"),
    ],
)
def test_faulty_tables_are_refused(tmp_path: Path, name: str, value: torch.Tensor | None, message: str) -> None:
    folder = write_checkpoint(tiny_model("qwen2"), tmp_path / "out", shard_bytes=10**9, tables=True).folder
    (folder / "report.json").unlink()
    edit_tensors(folder, {name: value})
    refused(folder, message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{EMBED}.weight_codes", None, f"{EMBED}.weight_codes is missing"),
        (
            f"{EMBED}.weight_codes",
            torch.zeros(320, 4, 8, dtype=torch.uint8),
            r"weight_codes is torch.uint8 \[320, 4, 8\]",
        ),
        (
            f"{EMBED}.weight_row_scale",
            torch.full((320,), torch.nan).bfloat16(),
            f"{EMBED}.weight_row_scale holds values",
        ),
        (f"{EMBED}.weight_row_scale", torch.full((320,), 3e38).bfloat16(), f"{EMBED} decodes to weights that are not"),
        (f"{EMBED}.weight_int8", torch.zeros(320, 32, dtype=torch.int8), f"{EMBED}.weight_int8 belongs to no module"),
    ],
)
def test_faulty_embeddings_in_planes_are_refused(
    tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    folder = write_checkpoint(tiny_model("qwen2"), tmp_path / "out", shard_bytes=10**9, tables=COMMON).folder
    (folder / "report.json").unlink()
    verify(Artifact.open(folder))
    edit_tensors(folder, {name: value})
    refused(folder, message)


def test_further_faults_are_counted(single: Path) -> None:
    edit_tensors(single, {f"{NAME}.weight_codes": None, f"{NAME}.weight_row_scale": None})
    refused(single, r"weight_codes is missing \(1 more faults\)")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "model-00002-of-.* differs from its checksum"),
        (cut, "model-00002-of-.* is truncated or damaged"),
        (append, "model-00002-of-.* is truncated or damaged"),
        (Path.unlink, "model-00002-of-.* is missing"),
    ],
)
def test_damaged_files_are_refused(sharded: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(next(sharded.glob("model-00002-of-*")))
    refused(sharded, message)


def test_an_index_that_contradicts_the_files_is_refused(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    moved = f"{NAME}.weight_codes"
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][moved])
    index["weight_map"][moved] = other
    path.write_text(json.dumps(index))
    refused(sharded, f"{moved} is in .*, but the index says {other}")


def test_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    duplicate = next(iter(load_file(first).items()))
    save_file(load_file(second) | dict([duplicate]), second, {"format": "pt"})
    refused(sharded, f"{duplicate[0]} is both in")


def test_a_file_outside_the_index_is_refused(sharded: Path) -> None:
    save_file({"x": torch.zeros(1)}, sharded / "stray.safetensors")
    refused(sharded, "stray.safetensors is not named in the index")


def test_a_module_without_tensors_is_refused(single: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    edit_config(single, modules=config["quantization_config"]["modules"] | {"model.extra": {"shape": [8, 8]}})
    refused(single, "model.extra.weight_codes is missing")


@pytest.mark.parametrize("files", [[], {}, {"model.safetensors": {}}, {"model.safetensors": {"sha256": "0"}}, "x"])
def test_a_report_of_other_files_is_refused(single: Path, files: object) -> None:
    (single / "report.json").write_text(json.dumps({"files": files}))
    refused(single, "report.json")
