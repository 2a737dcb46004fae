"""Exports a compressed checkpoint as a GGUF file, in the layout of llama.cpp's converter (convert_hf_to_gguf.py)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.errors import ExportError
from shiftadd_cli.export.decode import DecodedModel, check_place
from shiftadd_cli.export.gguf_tokenizer import GgufTokenizer
from shiftadd_cli.progress import progress
from shiftadd_cli.runtime.skeleton import artifact_skeleton, read_artifact_config
from shiftadd_cli.source.tokenizer import load_tokenizer
from shiftadd_cli.storage.refusals import refusals

# GGUF has a separate layout for every family, so families are listed: the name in GGUF, and whether GGUF orders rows of
# query and key projections in pairs (transformers orders them in halves).
_FAMILIES = {"llama": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
# Types that the writer takes as numbers; it takes all others as bytes.
_NUMBERS: dict[str, Any] = {"F32": np.float32, "F16": np.float16}
_FILE_TYPES = {"float32": "ALL_F32", "bfloat16": "MOSTLY_BF16", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}


def export_gguf(folder: Path, out: Path, dtype: str) -> tuple[Path, int]:
    """Write one file into the new folder `out`, completely or not at all; returns its path and its bytes.

    dtype: of matrices: `float32`, `bfloat16`, `float16` or `q8_0`; vectors are float32.

    Raises ExportError for an architecture or a tokenizer that GGUF lacks or represents differently.
    """
    artifact = Artifact.open(folder)
    _check_family(artifact.config.get("model_type"))
    config = read_artifact_config(folder)
    check_config(config)
    tokenizer = GgufTokenizer.read(load_tokenizer(folder, remote_code=False), config.vocab_size)
    decoded = DecodedModel(artifact, artifact_skeleton(folder, torch.float32))
    kinds = {name: _kind(shape, dtype) for name, (shape, _) in decoded.tensors.items()}
    check_place(out, folder, sum(_nbytes(shape, kinds[name]) for name, (shape, _) in decoded.tensors.items()))
    target = out.resolve()
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    file = f"{folder.resolve().name}-{dtype}.gguf"
    with refusals(out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _write(partial / file, decoded, config, tokenizer, kinds, dtype, folder.resolve().name)
            with (partial / file).open("rb") as written:
                os.fsync(written.fileno())
            os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out / file, (target / file).stat().st_size


def check_config(config: Any) -> None:
    """Refuse a model whose GGUF form is unknown here or would compute something else. Raises ExportError."""
    _check_family(config.model_type)
    rope = config.rope_parameters or {}
    reasons = {
        f"rope scaling ({rope.get('rope_type')})": rope.get("rope_type", "default") != "default",
        f"the activation {config.hidden_act}": config.hidden_act != "silu",
        "a sliding window": bool(getattr(config, "use_sliding_window", False)),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ExportError(
                f"The model has {reason}, which the GGUF export does not support; export with `format=dense` and "
                "convert the result with llama.cpp's convert_hf_to_gguf.py."
            )


def _check_family(model_type: Any) -> None:
    if model_type not in _FAMILIES:
        raise ExportError(
            f"Models of type {model_type} cannot be exported to GGUF, only {', '.join(_FAMILIES)}; export with "
            "`format=dense` and convert the result with llama.cpp's convert_hf_to_gguf.py."
        )


def _write(
    path: Path,
    decoded: DecodedModel,
    config: Any,
    tokenizer: GgufTokenizer,
    kinds: dict[str, Any],
    dtype: str,
    name: str,
) -> None:
    import gguf

    architecture, in_pairs = _FAMILIES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_config(writer, config)
    tokenizer.add_to(writer)
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture), config.num_hidden_layers
    )
    for tensor, (shape, _) in decoded.tensors.items():
        stored = names.get_name(tensor, (".weight", ".bias"))
        if stored is None:
            raise ExportError(f"GGUF has no name for {tensor}; export with `format=dense`.")
        kind = kinds[tensor]
        number, rows = np.dtype(_NUMBERS.get(kind.name, np.uint8)), shape
        if number == np.uint8:
            rows = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(stored, rows, number, _nbytes(shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, value in progress(decoded, len(decoded.tensors), "Decoding"):
        if in_pairs and (heads := _heads(tensor, config)):
            value = _pair_rows(value, heads)
        writer.write_tensor_data(gguf.quantize(_checked(tensor, value, kinds[tensor]), kinds[tensor]))
    writer.close()


def _add_config(writer: Any, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = _head_width(config)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _heads(tensor: str, config: Any) -> int:
    """Heads of a query or key projection, 0 for any other tensor."""
    if ".q_proj." in tensor:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in tensor else 0


def _pair_rows(value: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from halves (first all real parts, then all imaginary ones) to pairs."""
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(value.shape)


def _kind(shape: tuple[int, ...], dtype: str) -> Any:
    """The ggml type of a tensor: float32 for vectors, float16 for rows that do not divide into blocks of q8_0."""
    import gguf

    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    kind = gguf.GGMLQuantizationType[_TYPES[dtype]]
    return gguf.GGMLQuantizationType.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _nbytes(shape: tuple[int, ...], kind: Any) -> int:
    import gguf

    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // per_block * block_bytes


def _checked(name: str, value: Tensor, kind: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    numbers: np.ndarray[Any, np.dtype[np.float32]] = value.contiguous().numpy()
    if kind.name == "F16" and bool((value.abs() > torch.finfo(torch.float16).max).any()):
        raise ExportError(f"{name} holds numbers too large for float16; export with `dtype=bfloat16`.")
    return numbers
