"""Verification of a checkpoint folder: every check that works without the original model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from safetensors import safe_open

from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.format import SUFFIXES
from shiftadd_cli.artifact.linear_attention import SUBMODULE
from shiftadd_cli.artifact.shards import TensorShape
from shiftadd_cli.artifact.writer import sha256
from shiftadd_cli.bcq import int8
from shiftadd_cli.bcq.outliers import are_columns
from shiftadd_cli.bcq.weight import QuantizedWeight
from shiftadd_cli.errors import ArtifactError

# Rows decoded at a time.
_TILE_ROWS = 1024


def verify(artifact: Artifact) -> None:
    """Raise ArtifactError for the first fault, with the number of further ones.

    Every file must be complete and hold exactly the tensors of the index. Every compressed matrix and every table must
    have exactly its tensors, with their shapes and dtypes, and there must be no stray ones. Checksums must match those
    of report.json, if any. All stored numbers and all decoded weights must be finite.
    """
    faults = list(_structure(artifact)) or [*_checksums(artifact), *_values(artifact)]
    if faults:
        more = f" ({len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise ArtifactError(f"{artifact.folder}: {faults[0]}{more}; copy it again, or quantize the model again.")


def _structure(artifact: Artifact) -> Iterator[str]:
    headers, index = artifact.headers, artifact.index
    for file in sorted(path.name for path in artifact.folder.glob("*.safetensors")):
        if file not in headers:
            yield f"{file} is not named in the index"
    owners: dict[str, str] = {}
    for file, header in headers.items():
        for name in header:
            if name in owners:
                yield f"{name} is both in {owners[name]} and in {file}"
            owners[name] = file
    if index is not None:
        for name in index.keys() | owners.keys():
            if index.get(name) != owners.get(name):
                yield f"{name} is in {owners.get(name, 'no file')}, but the index says {index.get(name, 'no file')}"
    tensors = artifact.tensors
    expected: dict[str, TensorShape] = {}
    packed = {module: layout.tensors() for module, layout in artifact.layouts.items()}
    for module, stored in (packed | artifact.tables).items():
        expected |= {f"{module}.{suffix}": shape for suffix, shape in stored.items()}
        if f"{module}.weight" in tensors:
            yield f"{module}.weight is stored in addition to its compressed form"
    linear = artifact.format.linear_attention
    expected |= {name: (shape, torch.float32) for name, shape in (linear.tensors() if linear else {}).items()}
    for name, (shape, dtype) in expected.items():
        if name not in tensors:
            yield f"{name} is missing"
        elif tensors[name] != (shape, dtype):
            actual, kind = tensors[name]
            yield f"{name} is {kind} {list(actual)} instead of {dtype} {list(shape)}"
    for name in tensors.keys() - expected.keys():
        if name.endswith(SUFFIXES):
            yield f"{name} belongs to no module that config.json lists as compressed"
        if f".{SUBMODULE}." in name:
            yield f"{name} belongs to no module that config.json lists as linear attention"


def _checksums(artifact: Artifact) -> Iterator[str]:
    sums = (artifact.report or {}).get("files")
    if sums is None:
        return
    if not isinstance(sums, dict) or sums.keys() != artifact.headers.keys():
        yield "report.json lists other weight files than the folder holds"
        return
    for file in artifact.headers:
        if not isinstance(sums[file], dict) or sha256(artifact.folder / file) != sums[file].get("sha256"):
            yield f"{file} differs from its checksum in report.json"


def _values(artifact: Artifact) -> Iterator[str]:
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(safe_open(artifact.folder / name, framework="pt")) for name in artifact.headers
        }
        where = {tensor: files[file] for file, header in artifact.headers.items() for tensor in header}
        for module, layout in artifact.matrices.items():
            stored = {
                suffix: where[f"{module}.{suffix}"].get_tensor(f"{module}.{suffix}") for suffix in layout.tensors()
            }
            bad = [suffix for suffix, tensor in stored.items() if not _finite(tensor)]
            if bad:
                yield f"{module}.{bad[0]} holds values that are not finite"
            elif layout.outliers and not are_columns(stored["weight_column_ids"], layout.grid.columns):
                yield f"{module}.weight_column_ids names columns that are not there, or not in order"
            elif not all(_finite(tile) for _, tile in QuantizedWeight(layout, stored).tiles(_TILE_ROWS)):
                yield f"{module} decodes to weights that are not finite"
        for module, table in artifact.format.tables.items():
            if table.packed is not None:
                continue
            codes, scale = (where[f"{module}.{suffix}"].get_tensor(f"{module}.{suffix}") for suffix in int8.SUFFIXES)
            if bool((codes == torch.iinfo(torch.int8).min).any()):
                yield f"{module}.{int8.CODES} holds the code -128, which is not valid"
            # 127 is the largest magnitude of a code.
            if not _finite(127 * scale.float()):
                yield f"{module} decodes to weights that are not finite"
        packed = {f"{module}.{suffix}" for module, layout in artifact.matrices.items() for suffix in layout.tensors()}
        for name, file in where.items():
            if name not in packed and not name.endswith(int8.SUFFIXES) and not _finite(file.get_tensor(name)):
                yield f"{name} holds values that are not finite"


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
