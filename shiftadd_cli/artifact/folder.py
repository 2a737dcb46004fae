"""Reads a shiftadd checkpoint folder without its tensors: configuration, report and headers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shiftadd_cli.artifact.format import ArtifactFormat
from shiftadd_cli.artifact.shards import TensorShape, read_header
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.storage.safetensors_names import INDEX_FILE, SINGLE_FILE
from shiftadd_cli.version import QUANT_METHOD


@dataclass(frozen=True)
class Artifact:
    """A checkpoint folder; everything outside `config.json` is read on first use."""

    folder: Path
    config: dict[str, Any]
    format: ArtifactFormat

    @classmethod
    def open(cls, folder: Path) -> Artifact:
        """Open a folder; raises ArtifactError if it is missing, not ours, or of a format this version cannot read."""
        if not folder.is_dir():
            raise ArtifactError(f"{folder} is not a folder; give one that `shiftadd quantize` wrote.")
        if not (folder / "config.json").is_file():
            raise ArtifactError(f"{folder} has no config.json; give a folder that `shiftadd quantize` wrote.")
        config = read_json(folder / "config.json")
        quantization = config.get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
            raise ArtifactError(
                f"{folder} is not compressed by shiftadd; give a folder that `shiftadd quantize` wrote."
            )
        return cls(folder, config, ArtifactFormat.from_dict(quantization))

    @property
    def layouts(self) -> Mapping[str, PackedLayout]:
        """Layout of every compressed linear layer, by module name."""
        return self.format.modules

    @cached_property
    def tables(self) -> dict[str, dict[str, TensorShape]]:
        """Tensors of every table, by module name and suffix."""
        return {name: table.tensors() for name, table in self.format.tables.items()}

    @property
    def matrices(self) -> dict[str, PackedLayout]:
        """Layout of every compressed matrix, those of tables included, by module name."""
        packed = {name: table.packed for name, table in self.format.tables.items()}
        return {**self.layouts, **{name: layout for name, layout in packed.items() if layout is not None}}

    @cached_property
    def report(self) -> dict[str, Any] | None:
        """report.json; None if there is none (in a folder written by `save_pretrained`)."""
        path = self.folder / "report.json"
        return read_json(path) if path.is_file() else None

    @cached_property
    def index(self) -> dict[str, str] | None:
        """File name by tensor name, from the index; None for a checkpoint of one file."""
        path = self.folder / INDEX_FILE
        if not path.is_file():
            return None
        names = read_json(path).get("weight_map")
        # File names come from outside, so none may lead out of the folder.
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise ArtifactError(f"{path} has no table of tensors and files; copy it again.")
        return names

    @cached_property
    def headers(self) -> dict[str, dict[str, TensorShape]]:
        """Tensors of every weight file, by file name; raises ArtifactError for a missing or damaged file."""
        files = [SINGLE_FILE] if self.index is None else sorted(set(self.index.values()))
        return {name: read_header(self.folder / name) for name in files}

    @property
    def tensors(self) -> dict[str, TensorShape]:
        """All tensors, by name."""
        return {name: shape for header in self.headers.values() for name, shape in header.items()}

    @property
    def file_bytes(self) -> int:
        """Size of the weight files on disk."""
        return sum((self.folder / name).stat().st_size for name in self.headers)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raises ArtifactError if it is anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise ArtifactError(f"{path} cannot be read as JSON ({failure}); copy it again.") from failure
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is not a JSON object; copy it again.")
    return content
