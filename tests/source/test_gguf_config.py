"""The configuration from a GGUF file against the one that transformers derives from the whole file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_models import save_tiny_gguf
from transformers import AutoConfig

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import open_source
from shiftadd_cli.source.gguf_config import read_gguf_config
from shiftadd_cli.source.gguf_header import read_gguf_header


def test_leaving_the_vocabulary_out_changes_nothing(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf")
    config = read_gguf_config(read_gguf_header(tmp_path / "tiny.gguf")).to_dict()
    reference = AutoConfig.from_pretrained(tmp_path, gguf_file="tiny.gguf").to_dict()
    assert config.pop("_name_or_path") == str(tmp_path / "tiny.gguf")
    reference.pop("_name_or_path")
    assert config == reference
    assert config["vocab_size"] == 320


def test_architecture_unknown_to_transformers_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "oddformer")
    writer.add_tensor("output_norm.weight", np.ones(4, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(SourceError, match=r"'oddformer'.*give the model as a safetensors folder"):
        open_source(str(tmp_path / "odd.gguf"))
