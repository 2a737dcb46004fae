"""The configuration of a model from the metadata of its GGUF file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from shiftadd_cli.errors import SourceError, first_line
from shiftadd_cli.source.gguf_header import GgufFile
from shiftadd_cli.source.gguf_rope import read_rope

_VOCABULARY = "tokenizer."
_TOKENS = "tokenizer.ggml.tokens"


def read_gguf_config(file: GgufFile) -> Any:
    """The `PretrainedConfig` transformers derives from the file, without a quantization entry.

    For most architectures transformers parses the vocabulary string by string. This takes seconds and does not
    affect the result if the file states the vocabulary size. Such a file is passed to it as a copy without vocabulary
    and with empty tensors. A model in several parts is passed in the same way, with its number of empty tokens.

    Raises:
        SourceError: transformers has no configuration for the architecture, or the metadata is incomplete, or the
            scaling of rotary positions has no setting in transformers.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    # No single one of several parts contains all tensors.
    as_is = len(file.headers) == 1 and (
        file.architecture in GGUF_CONFIG_ARCHS or f"{file.architecture}.vocab_size" not in file.metadata
    )
    with tempfile.TemporaryDirectory() as folder:
        shown = file.path if as_is else _without_vocabulary(file, Path(folder) / file.path.name)
        try:
            config = AutoConfig.from_pretrained(shown.parent, gguf_file=shown.name, local_files_only=True)
        except (ValueError, KeyError, TypeError, NotImplementedError, StrictDataclassError) as error:
            reason = first_line(error)
            raise SourceError(
                f"{file.path} holds the architecture {file.architecture!r}, which transformers cannot read from GGUF "
                f"({reason}); give the model as a safetensors folder."
            ) from error
    # Quantized blocks are decoded on loading, so the model is held and saved as an ordinary one.
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    read_rope(config, file)
    config.name_or_path = str(file.path)
    return config


def _without_vocabulary(file: GgufFile, copy: Path) -> Path:
    import numpy as np
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(copy, file.architecture)
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.INT64,
        float: GGUFValueType.FLOAT64,
        str: GGUFValueType.STRING,
    }
    for key, value in file.metadata.items():
        scalar_token = key.startswith(_VOCABULARY) and key.endswith("_token_id")
        if (
            key == "general.architecture"
            or key.startswith("split.")
            or (key.startswith(_VOCABULARY) and not scalar_token)
        ):
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kinds[type(value)])
    if isinstance(count := file.metadata.get(_TOKENS), int) and f"{file.architecture}.vocab_size" not in file.metadata:
        writer.add_array(_TOKENS, [""] * count)
    for tensor in file.tensors:
        writer.add_tensor(tensor.name, np.zeros(1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy
