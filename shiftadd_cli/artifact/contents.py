"""Contents of a checkpoint, counted from the headers of its files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.linear_attention import LinearAttentionFormat
from shiftadd_cli.artifact.shards import nbytes
from shiftadd_cli.bcq.choices import Primitive
from shiftadd_cli.device import dtype_name

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Packed:
    """One compressed matrix, or `count` of the same kind; `stored_bytes` is their total."""

    name: str
    count: int
    out_features: int
    in_features: int
    bits: int
    scale_format: str
    stored_bytes: int
    primitive: Primitive

    @property
    def weights(self) -> int:
        return self.count * self.out_features * self.in_features


@dataclass(frozen=True)
class Table:
    """One compressed embedding, head or patch embedding. `primitive` is None for 8-bit rows."""

    name: str
    rows: int
    columns: int
    stored_bytes: int
    bits: int = 8
    primitive: Primitive | None = None

    @property
    def weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Kept:
    """One tensor stored unchanged, or `count` of the same kind; `stored_bytes` is their total."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    stored_bytes: int


_Entry = TypeVar("_Entry", Packed, Kept)


@dataclass(frozen=True)
class Contents:
    """All tensors of a checkpoint. `kept` starts with the largest; `layers` and `tables` follow config.json.
    `linear_attention` is None if all attention layers are softmax layers."""

    folder: str
    architecture: str
    format_version: int
    files: int
    file_bytes: int
    has_checksums: bool
    layers: tuple[Packed, ...]
    tables: tuple[Table, ...]
    kept: tuple[Kept, ...]
    linear_attention: LinearAttentionFormat | None = None

    @classmethod
    def of(cls, artifact: Artifact) -> Contents:
        """Count the tensors in an artifact's headers; raises ArtifactError for damaged files, as `Artifact` does."""
        tensors, names = artifact.tensors, artifact.config.get("architectures")
        suffixes = {module: layout.tensors() for module, layout in artifact.layouts.items()} | artifact.tables
        stored = dict.fromkeys(suffixes, 0)
        unpacked = []
        for name, shape in tensors.items():
            module, _, suffix = name.rpartition(".")
            if suffix in suffixes.get(module, {}):
                stored[module] += nbytes(shape)
            else:
                unpacked.append(Kept(name, 1, shape[0], dtype_name(shape[1]), nbytes(shape)))
        layers = tuple(
            Packed(
                name,
                1,
                layout.rows,
                layout.columns,
                layout.bits,
                layout.scales.scale_format,
                stored[name],
                layout.format.primitive,
            )
            for name, layout in artifact.layouts.items()
        )
        return cls(
            folder=str(artifact.folder),
            architecture=", ".join(map(str, names)) if isinstance(names, list) and names else "unknown model",
            format_version=artifact.config["quantization_config"]["format_version"],
            files=len(artifact.headers),
            file_bytes=artifact.file_bytes,
            has_checksums="files" in (artifact.report or {}),
            layers=layers,
            tables=tuple(
                Table(name, table.rows, table.columns, stored[name], table.bits, table.primitive)
                for name, table in artifact.format.tables.items()
            ),
            kept=tuple(sorted(unpacked, key=lambda tensor: (-tensor.stored_bytes, tensor.name))),
            linear_attention=artifact.format.linear_attention,
        )

    @property
    def kinds(self) -> tuple[Packed, ...]:
        """Layers, with those that differ only in their block number merged into one row."""
        return _merge(self.layers)

    @property
    def kept_kinds(self) -> tuple[Kept, ...]:
        """The same for tensors stored unchanged, largest first."""
        return tuple(sorted(_merge(self.kept), key=lambda tensor: -tensor.stored_bytes))

    @property
    def packed_bytes(self) -> int:
        return sum(layer.stored_bytes for layer in self.layers)

    @property
    def packed_weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def table_bytes(self) -> int:
        return sum(table.stored_bytes for table in self.tables)

    @property
    def kept_bytes(self) -> int:
        return sum(tensor.stored_bytes for tensor in self.kept)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the compressed matrices; 0 if there are none."""
        return 8 * self.packed_bytes / self.packed_weights if self.layers else 0.0

    @property
    def file_bits_per_weight(self) -> float:
        """Size of all weight files per number they represent; tied tensors are stored, and so counted, once."""
        kept_numbers = sum(math.prod(tensor.shape) for tensor in self.kept)
        return 8 * self.file_bytes / (self.packed_weights + sum(table.weights for table in self.tables) + kept_numbers)

    def to_dict(self) -> dict[str, Any]:
        """The contents and their totals as plain JSON."""
        totals = (
            *("packed_bytes", "packed_weights", "table_bytes", "kept_bytes"),
            *("bits_per_weight", "file_bits_per_weight"),
        )
        return (
            asdict(self) | {"kinds": [asdict(row) for row in self.kinds]} | {key: getattr(self, key) for key in totals}
        )


def alike(name: str) -> str:
    """The name with its numbers as `*`, so that numbered modules (blocks, experts) share one name."""
    return _NUMBER.sub("*", name)


def _merge(entries: Iterable[_Entry]) -> tuple[_Entry, ...]:
    rows: dict[_Entry, list[_Entry]] = {}
    for entry in entries:
        common = replace(entry, name=alike(entry.name), stored_bytes=0)
        rows.setdefault(common, []).append(entry)
    return tuple(
        replace(common, count=len(members), stored_bytes=sum(member.stored_bytes for member in members))
        for common, members in rows.items()
    )
