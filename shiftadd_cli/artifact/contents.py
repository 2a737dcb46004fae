"""What a checkpoint stores, counted from its files' headers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.shards import nbytes
from shiftadd_cli.device import dtype_name

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Packed:
    """One compressed matrix, or `count` alike ones; `stored_bytes` of all of them together."""

    name: str
    count: int
    out_features: int
    in_features: int
    bits: int
    scale_format: str
    stored_bytes: int
    primitive: str = "bcq"

    @property
    def weights(self) -> int:
        return self.count * self.out_features * self.in_features


@dataclass(frozen=True)
class Table:
    """One embedding, output head or patch embedding stored as 8-bit rows."""

    name: str
    rows: int
    columns: int
    stored_bytes: int

    @property
    def weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Kept:
    """One tensor stored as it was, or `count` alike ones; `stored_bytes` of all of them together."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    stored_bytes: int


_Entry = TypeVar("_Entry", Packed, Kept)


@dataclass(frozen=True)
class Contents:
    """All tensors of a checkpoint: `kept` largest first, `layers` and `tables` in the order of config.json."""

    folder: str
    architecture: str
    format_version: int
    files: int
    file_bytes: int
    has_checksums: bool
    layers: tuple[Packed, ...]
    tables: tuple[Table, ...]
    kept: tuple[Kept, ...]

    @classmethod
    def of(cls, artifact: Artifact) -> Contents:
        """Count an artifact's headers; raises ArtifactError as `Artifact` does for damaged files."""
        tensors, names = artifact.tensors, artifact.config.get("architectures")
        suffixes = {module: layout.tensors() for module, layout in artifact.layouts.items()} | artifact.tables
        stored = dict.fromkeys(suffixes, 0)
        kept = []
        for name, shape in tensors.items():
            module, _, suffix = name.rpartition(".")
            if suffix in suffixes.get(module, {}):
                stored[module] += nbytes(shape)
            else:
                kept.append(Kept(name, 1, shape[0], dtype_name(shape[1]), nbytes(shape)))
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
                Table(name, shape[0], math.prod(shape[1:]), stored[name])
                for name, shape in artifact.format.tables.items()
            ),
            kept=tuple(sorted(kept, key=lambda each: (-each.stored_bytes, each.name))),
        )

    @property
    def kinds(self) -> tuple[Packed, ...]:
        """Layers that differ only in the number of their block, as one row each."""
        return _merge(self.layers)

    @property
    def kept_kinds(self) -> tuple[Kept, ...]:
        """The same for tensors stored as they were, largest first."""
        return tuple(sorted(_merge(self.kept), key=lambda each: -each.stored_bytes))

    @property
    def packed_bytes(self) -> int:
        return sum(each.stored_bytes for each in self.layers)

    @property
    def packed_weights(self) -> int:
        return sum(each.weights for each in self.layers)

    @property
    def table_bytes(self) -> int:
        return sum(each.stored_bytes for each in self.tables)

    @property
    def kept_bytes(self) -> int:
        return sum(each.stored_bytes for each in self.kept)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the compressed matrices; 0 if there are none."""
        return 8 * self.packed_bytes / self.packed_weights if self.layers else 0.0

    @property
    def file_bits_per_weight(self) -> float:
        """All weight files over all numbers they stand for; tied tensors are stored, and so counted, once."""
        kept = sum(math.prod(each.shape) for each in self.kept)
        return 8 * self.file_bytes / (self.packed_weights + sum(each.weights for each in self.tables) + kept)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        totals = (
            *("packed_bytes", "packed_weights", "table_bytes", "kept_bytes"),
            *("bits_per_weight", "file_bits_per_weight"),
        )
        return (
            asdict(self) | {"kinds": [asdict(row) for row in self.kinds]} | {key: getattr(self, key) for key in totals}
        )


def alike(name: str) -> str:
    """Blocks, experts, and what else is numbered, go by one name."""
    return _NUMBER.sub("*", name)


def _merge(entries: Iterable[_Entry]) -> tuple[_Entry, ...]:
    rows: dict[_Entry, list[_Entry]] = {}
    for entry in entries:
        common = replace(entry, name=alike(entry.name), stored_bytes=0)
        rows.setdefault(common, []).append(entry)
    return tuple(
        replace(common, count=len(members), stored_bytes=sum(each.stored_bytes for each in members))
        for common, members in rows.items()
    )
