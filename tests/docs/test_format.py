"""The format specification suffices: a reader written from it alone decodes what `shiftadd` writes to the same numbers.

Matrices are equal to the bit without a rotation, and before a rotation is folded back. After that they are equal up to
rounding, because the reader sums in float64.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import COMMON, write_checkpoint
from format_reader import Reader
from formats import matrix_format
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_models import save_tiny, tiny_model
from tiny_vision import save_tiny_vision

import shiftadd_cli
from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.format import FORMAT_VERSION, SUFFIXES
from shiftadd_cli.bcq.choices import CODE_BITS
from shiftadd_cli.bcq.int8 import decode_table
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.bcq.primitives import PRIMITIVES
from shiftadd_cli.bcq.primitives.planes import BinaryPlanes
from shiftadd_cli.bcq.primitives.shifts.levels import MAGNITUDES
from shiftadd_cli.bcq.primitives.trellis.codes import CODES
from shiftadd_cli.bcq.weight import QuantizedWeight
from shiftadd_cli.runtime.linear import PackedLinear
from shiftadd_cli.runtime.table import Table

# Relative to the largest magnitude, for several passes of float32 sums of up to 64 terms.
ROUNDING = 1e-5

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {}),
    "bits of its own for every layer": ("llama", {"recipe": "default", "avg_bits": 4.5}),
    "pot": ("llama", {"scale_format": "pot", "group_size": 16}),
    "apot3 with offset": ("llama", {"scale_format": "apot3", "offset": True, "group_size": 16}),
    "float with offset": ("llama", {"scale_format": "float", "offset": True, "row_scale": False, "rotation": "none"}),
    "groups by rows": ("llama", {"recipe": "shiftaddllm-lat", "embedding_bits": 16}),
    "one group of all rows": ("llama", {"recipe": "shiftaddllm-acc", "shard_size": "30KB"}),
    "trellis1": ("llama", {"primitive": "trellis1", "bits": 2, "group_size": "all", "scale_format": "apot3"}),
    "trellis2 with offset": ("llama", {"primitive": "trellis2", "bits": 3, "offset": True, "rotation": "none"}),
    "shift1": ("llama", {"primitive": "shift1", "bits": 3}),
    "shift2": ("llama", {"primitive": "shift2", "bits": 4, "rotation": "none"}),
    "outlier columns": ("llama", {"outlier_columns": 0.05}),
    "a mixture": ("llama", {"recipe": "shiftaddvit", "avg_bits": 4.2, "candidates": (2, 4, "shift1", "shift2")}),
    "stored transposed by the model": ("gpt2", {}),
    "tied embeddings": ("qwen2", {"bits": 2}),
    "embedding in planes": ("llama", {"embedding_bits": 5}),
    "tied embedding in trellis-coded planes": ("qwen2", {"embedding_bits": "trellis1-4", "outlier_columns": 0.05}),
    "patches of images": ("vit", {"recipe": "fast"}),
    "patches of images in planes": ("vit", {"recipe": "fast", "embedding_bits": 4}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    texts = {name: save_tiny(name, folder / name) for name in ("llama", "gpt2", "qwen2")}
    return texts | {"vit": save_tiny_vision("vit", folder / "vit")}


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_is_read(
    models: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SHIFTADD_KERNEL", "reference")
    family, fields = RUNS[name]
    options: dict[str, Any] = {"recipe": "equal-bits", "samples": 4, "seq_len": 32, **fields}
    shiftadd_cli.quantize(models[family], tmp_path / "out", **options)
    check(tmp_path / "out")
    reader, model = Reader(tmp_path / "out"), shiftadd_cli.load(tmp_path / "out")
    for module, packed in model.named_modules():
        if isinstance(packed, PackedLinear) and not isinstance(packed, Table):
            close(reader.matrix(module), packed.decode())
        elif isinstance(packed, Table) and module in reader.tables:
            close(reader.table(module), packed.decode())
    linears = {name for name, packed in model.named_modules() if isinstance(packed, PackedLinear)}
    assert {name for name in linears if not isinstance(model.get_submodule(name), Table)} == set(reader.modules)


def formats(primitive: Any, bits: int) -> st.SearchStrategy[MatrixFormat]:
    return st.builds(
        MatrixFormat,
        primitive=st.just(primitive),
        bits=st.just(bits),
        group_size=st.sampled_from(["all", 1, 5, 8, 16, 999]),
        group_rows=st.sampled_from(["all", 1, 3, "1/8", "1/5", 999]),
        scale_format=st.sampled_from(["pot", "apot2", "apot3", "float"]),
        row_scale=st.booleans(),
        offset=st.booleans(),
        rotation=st.sampled_from(["none", "hadamard"]),
        outlier_columns=st.sampled_from([0.0, 0.01, 0.11]),
    )


PLANE_CODES = [
    (primitive, bits)
    for primitive in PRIMITIVES
    if isinstance(PRIMITIVES[primitive], BinaryPlanes)
    for bits in CODE_BITS[primitive]
]


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(PLANE_CODES).flatmap(lambda code: formats(*code)), tables=st.sampled_from([False, True, None])
)
def test_every_byte_means_what_the_page_says(
    tmp_path_factory: pytest.TempPathFactory, form: MatrixFormat, tables: bool | None
) -> None:
    """Random bytes also contain codes that no run happens to write."""
    folder = tmp_path_factory.mktemp("random") / "out"
    stored = form if tables is None else tables
    check(write_checkpoint(tiny_model("llama"), folder, common=form, tables=stored).folder)


@pytest.mark.parametrize(("primitive", "bits"), MAGNITUDES)
def test_every_code_of_shift_layers_means_what_the_page_says(primitive: Any, bits: int, tmp_path: Path) -> None:
    form = matrix_format(bits, 16, 1, "apot2", True, False, "hadamard", 0.0, primitive)
    check(write_checkpoint(tiny_model("llama"), tmp_path / "out", common=COMMON, own={"_proj": form}).folder)


def check(folder: Path) -> None:
    """Compare the reader's numbers with those of `shiftadd`."""
    reader, artifact = Reader(folder), Artifact.open(folder)
    stored = _tensors(artifact)
    assert set(reader.modules) == set(artifact.layouts)
    assert set(reader.tables) == set(artifact.tables)
    for name, layout in artifact.layouts.items():
        weight = QuantizedWeight(layout, {suffix: stored[f"{name}.{suffix}"] for suffix in layout.tensors()})
        equal(reader.planes(name), weight.decode_stored())
        (close if layout.rotation else equal)(reader.matrix(name), weight.decode())
    for name, table in artifact.format.tables.items():
        own = {suffix: stored[f"{name}.{suffix}"] for suffix in table.tensors()}
        if table.packed is None:
            equal(reader.table(name), decode_table(own["weight_int8"], own["weight_int8_scale"]))
            continue
        weight = QuantizedWeight(table.packed, own)
        equal(reader.planes(name), weight.decode_stored())
        (close if table.packed.rotation else equal)(reader.table(name), weight.decode().view(table.shape))


def equal(decoded: Any, ours: torch.Tensor) -> None:
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, ours.numpy())


def close(decoded: Any, ours: torch.Tensor) -> None:
    assert decoded.shape == tuple(ours.shape)
    assert np.abs(decoded - ours.numpy()).max() <= ROUNDING * np.abs(decoded).max()


def _tensors(artifact: Artifact) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in artifact.headers:
        with safe_open(artifact.folder / file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def test_reader_imports_nothing_of_the_package(repository: Path) -> None:
    tree = ast.parse((repository / "tests" / "helpers" / "format_reader.py").read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {str(name).partition(".")[0] for name in imported} - {"numpy"} <= sys.stdlib_module_names


def test_page_names_every_tensor_key_and_version(repository: Path) -> None:
    page = (repository / "docs" / "format.md").read_text(encoding="utf-8")
    names = set(re.findall(r"^\| `(\w+)`", page, flags=re.MULTILINE))
    assert set(SUFFIXES) <= names
    assert {*MatrixFormat.model_fields, "quant_method", "format_version"} <= names
    assert FORMAT_VERSION == 6, "the page speaks of versions 1 to 6"
    example = json.loads(re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)[0])
    assert {*MatrixFormat.model_fields} - {"primitive"} <= example.keys()
    rows = re.findall(r"^\| `(shift\d)` \| (\d) \| ([\d, ]+) \| (\d+) \|", page, flags=re.MULTILINE)
    listed = {(name, int(bits)): tuple(map(int, values.split(","))) for name, bits, values, _ in rows}
    assert listed == MAGNITUDES
    rows = re.findall(r"^\| `trellis\d` \| (\d) \| (\d) \| ([`0-9a-f, ]+) \|", page, flags=re.MULTILINE)
    masks = {(int(k), int(m)): tuple(int(mask, 16) for mask in re.findall(r"\w+", row)) for k, m, row in rows}
    assert masks == {sizes: entry.code.masks for sizes, entry in CODES.items()}
