"""Exports a compressed checkpoint as a plain transformers folder, which loads without this package."""

from __future__ import annotations

from pathlib import Path

import torch

from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.shards import nbytes
from shiftadd_cli.artifact.writer import ArtifactWriter
from shiftadd_cli.device import dtype_name
from shiftadd_cli.export.decode import DecodedModel, check_place
from shiftadd_cli.export.original_names import OriginalNames
from shiftadd_cli.export.stacks import StackedModel
from shiftadd_cli.progress import progress
from shiftadd_cli.runtime.remote_code import CODE_FILE, brings_code
from shiftadd_cli.runtime.skeleton import artifact_skeleton
from shiftadd_cli.source.companions import copy_companions
from shiftadd_cli.source.config_file import set_dtype


def export_dense(folder: Path, out: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> int:
    """Write `out` completely or not at all; returns the bytes of its weight files.

    dtype: of all tensors except those that transformers keeps in float32; by default the checkpoint's.
    trust_remote_code: run model code that comes with the checkpoint.

    Raises ArtifactError for a damaged checkpoint, OutputError if `out` cannot be written, ExportError if `dtype` cannot
    hold a number.
    """
    artifact = Artifact.open(folder)
    skeleton = artifact_skeleton(folder, dtype, trust_remote_code=trust_remote_code)
    decoded = OriginalNames(StackedModel(DecodedModel(artifact, skeleton), skeleton), skeleton)
    check_place(out, folder, sum(map(nbytes, decoded.tensors.values())))
    config = {name: value for name, value in artifact.config.items() if name != "quantization_config"}
    if (folder / CODE_FILE).is_file():
        config.pop("auto_map", None)
    if dtype is not None:
        set_dtype(config, dtype_name(dtype))
    with ArtifactWriter(out) as writer:
        writer.plan(decoded.tensors)
        for name, tensor in progress(decoded, len(decoded.tensors), "Decoding"):
            writer.add(name, tensor)
        copy_companions(folder, writer.folder, code=trust_remote_code and brings_code(config))
        writer.finish(config)
        return writer.nbytes
