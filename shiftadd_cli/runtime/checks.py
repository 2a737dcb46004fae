"""Checks that a checkpoint fits the model built for it, so that no tensor is left at a random value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from shiftadd_cli.artifact.format import SUFFIXES
from shiftadd_cli.artifact.shards import read_header
from shiftadd_cli.bcq.outliers import are_columns
from shiftadd_cli.errors import ArtifactError

_AGAIN = "quantize the model again"


def check_files(model: nn.Module, files: Sequence[str]) -> None:
    """Compare shapes and stored dtypes in safetensors headers with the model's; raises ArtifactError.

    Names that the model lacks are left to `check_loaded`: transformers may rename them on loading.
    """
    expected = model.state_dict()
    # The index names files, and comes from outside.
    if len({Path(file).parent for file in files}) > 1 or any(".." in Path(file).parts for file in files):
        raise ArtifactError(f"The index of {files[0]} names files outside its folder; do not use this checkpoint.")
    for file in files:
        if not file.endswith(".safetensors"):
            raise ArtifactError(f"{file} is no safetensors file, which shiftadd checkpoints consist of; {_AGAIN}.")
        for name, (found, kind) in read_header(Path(file)).items():
            if name not in expected:
                continue
            shape, dtype = tuple(expected[name].shape), expected[name].dtype
            if found != shape:
                raise ArtifactError(
                    f"{name} in {file} has shape {list(found)}, and config.json asks for {list(shape)}; {_AGAIN}."
                )
            if name.endswith(SUFFIXES) and kind != dtype:
                raise ArtifactError(f"{name} in {file} is {kind}, and the format says {dtype}; {_AGAIN}.")


def check_loaded(model: nn.Module, architectures: Sequence[str]) -> None:
    """Raise ArtifactError for the first parameter, or buffer of a table, that was not in the checkpoint.

    Of another class than the checkpoint's `architectures` (a new head on the same body) only compressed matrices are
    checked. transformers marks what it loaded or tied; parameters offloaded to disk are on the meta device.
    """
    everything = type(model).__name__ in architectures
    scales = [(name, each) for name, each in _persistent_buffers(model) if name.endswith(SUFFIXES)]
    for name, parameter in [*model.named_parameters(), *scales]:
        loaded = parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)
        if not loaded and (everything or name.endswith(SUFFIXES)):
            raise ArtifactError(f"The checkpoint lacks the tensor {name}; copy it again, or {_AGAIN}.")


def check_values(name: str, stored: Mapping[str, Tensor], columns: int) -> None:
    """Raise ArtifactError for stored values of the module `name`, of so many input columns, that no writer stores.

    stored: tensors by suffix. Codes of planes and exponents may be anything; what is on the meta device is not looked
    at. Outlier columns that are not there would be read from memory that is not theirs.
    """
    for suffix, tensor in stored.items():
        if tensor.is_meta:
            continue
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{name}.{suffix} holds values that are not finite; copy it again, or {_AGAIN}.")
        if suffix == "weight_column_ids" and not are_columns(tensor, columns):
            raise ArtifactError(
                f"{name}.{suffix} names columns that are not there, or not in order; copy it again, or {_AGAIN}."
            )


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    stored = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in stored]
