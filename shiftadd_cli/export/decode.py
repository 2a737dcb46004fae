"""Decodes the tensors of a compressed checkpoint, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.output import check_output
from shiftadd_cli.artifact.shards import TensorShape
from shiftadd_cli.bcq import int8
from shiftadd_cli.bcq.weight import QuantizedWeight
from shiftadd_cli.errors import ArtifactError, ExportError, OutputError
from shiftadd_cli.source.linear import linear_sizes
from shiftadd_cli.source.skeleton import tied_groups

# Rows of a table decoded at a time.
_TABLE_ROWS = 4096


class DecodedModel:
    """A checkpoint as dense tensors, with only one in memory at a time.

    `skeleton` is the dense model on meta, which gives the names, shapes and dtypes. Each tied parameter comes once, in
    the order of the files. The values are those of the model's `dequantize()`.

    Raises ArtifactError if the checkpoint holds other tensors than the model, or tensors of other shapes; ExportError
    if it has linear attention.
    """

    def __init__(self, artifact: Artifact, skeleton: Any) -> None:
        if artifact.format.linear_attention is not None:
            raise ExportError(
                f"{artifact.folder} has linear attention, which no other program knows; export the model that it was "
                "made from."
            )
        self._artifact = artifact
        self._transposed = {
            name: sizes[2]
            for name, module in skeleton.named_modules()
            if name in artifact.layouts and (sizes := linear_sizes(module)) is not None
        }
        parts = {module: layout.tensors() for module, layout in artifact.layouts.items()} | artifact.tables
        # Stored tensors by the name of the dense one.
        self._stored: dict[str, list[str]] = {}
        for name in artifact.tensors:
            module, _, suffix = name.rpartition(".")
            dense = f"{module}.weight" if suffix in parts.get(module, {}) else name
            self._stored.setdefault(dense, []).append(name)
        state = skeleton.state_dict()
        self.tensors: dict[str, TensorShape] = {}
        for name in self._stored:
            if name not in state:
                raise ArtifactError(
                    f"{artifact.folder} holds {name}, which {type(skeleton).__name__} does not have; quantize the "
                    "model again."
                )
            shape, stored_shape = tuple(state[name].shape), self._shape(name)
            if stored_shape != shape:
                raise ArtifactError(
                    f"{name} in {artifact.folder} is {list(stored_shape)}, but the model has {list(shape)}; "
                    "quantize the model again."
                )
            self.tensors[name] = (shape, state[name].dtype)
        names = {member: group for group in tied_groups(skeleton) for member in group}
        if absent := [
            name for name, _ in skeleton.named_parameters() if self.tensors.keys().isdisjoint(names.get(name, (name,)))
        ]:
            raise ArtifactError(f"{artifact.folder} lacks {absent[0]}; copy it again, or quantize the model again.")

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors. Raises ExportError, naming the tensor, for numbers too large for float16."""
        artifact = self._artifact
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(safe_open(artifact.folder / name, framework="pt"))
                for name in artifact.headers
            }
            where = {tensor: files[file] for file, header in artifact.headers.items() for tensor in header}
            for name, stored in self._stored.items():
                tensors = {key.rpartition(".")[2]: where[key].get_tensor(key) for key in stored}
                dtype = self.tensors[name][1]
                tensor = self._decode(name, tensors, dtype)
                if dtype == torch.float16 and not bool(torch.isfinite(tensor).all()):
                    raise ExportError(f"{name} holds numbers too large for float16; export with `dtype=bfloat16`.")
                yield name, tensor

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of the dense tensor, derived from its stored tensors."""
        module = name.rpartition(".")[0]
        if name == f"{module}.weight" and module in self._artifact.format.tables:
            return self._artifact.format.tables[module].shape
        if name == f"{module}.weight" and module in self._transposed:
            grid = self._artifact.layouts[module].grid
            return (grid.columns, grid.rows) if self._transposed[module] else (grid.rows, grid.columns)
        return self._artifact.tensors[name][0]

    def _decode(self, name: str, stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        module = name.rpartition(".")[0]
        if int8.CODES in stored:
            return _decode_table(stored[int8.CODES], stored[int8.SCALE], dtype)
        table = self._artifact.format.tables.get(module)
        if table is not None and table.packed is not None and name == f"{module}.weight":
            return _decode_matrix(QuantizedWeight(table.packed, stored), dtype).view(table.shape)
        if module not in self._transposed or name != f"{module}.weight":
            return next(iter(stored.values())).to(dtype)
        decoded = QuantizedWeight(self._artifact.layouts[module], stored).decode().to(dtype)
        return decoded.T.contiguous() if self._transposed[module] else decoded


def _decode_table(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    decoded = torch.empty(codes.shape, dtype=dtype)
    for start in range(0, len(codes), _TABLE_ROWS):
        rows = slice(start, start + _TABLE_ROWS)
        decoded[rows] = int8.decode_table(codes[rows], scales[rows], dtype)
    return decoded


def _decode_matrix(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Like `decode()`, but without the whole matrix in float32."""
    decoded = torch.empty(weight.layout.rows, weight.layout.columns, dtype=dtype)
    for rows, tile in weight.tiles(_TABLE_ROWS):
        decoded[rows] = weight.completed(tile, rows).to(dtype)
    return decoded


def check_place(out: Path, source: Path, expected_bytes: int) -> None:
    """Refuse, before any work, a folder that cannot be written or is not empty: an export never overwrites files."""
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} exists and is not empty; give -o a folder that does not exist yet.")
    check_output(out, source, overwrite=False, expected_bytes=expected_bytes)
