"""Files beside weights and configuration: companions are copied byte for byte, and nothing else is."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_models import save_tiny, save_tiny_gguf, tiny_tokenizer
from transformers import AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from shiftadd_cli.errors import OutputError
from shiftadd_cli.source import open_source
from shiftadd_cli.source.companions import copy_companions

COMPANIONS = {
    "added_tokens.json": "{}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}\r\n",
    "chat_template.jinja": "{{ messages }}",
    "chat_template.json": '{"chat_template": "x"}',
    "generation_config.json": '{"max_new_tokens": 7,   "eos_token_id": 0}',
    "merges.txt": "a b\n",
    "preprocessor_config.json": '{"image_processor_type": "Gemma3ImageProcessor"}',
    "processor_config.json": '{"processor_class": "Gemma3Processor", "image_seq_length": 4}',
    "special_tokens_map.json": '{"bos_token":"<|endoftext|>"}',
    "spiece.model": "\x00\x01",
    "tokenizer.model": "\x00\x02",
    "video_preprocessor_config.json": "{}",
    "vocab.json": "{}",
}
OTHERS = (
    *("README.md", "report.json", "report.html", "configuration_shiftadd.py", "modeling.py", "config.json"),
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "consolidated.00.pth"),
    *("pytorch_model.bin", "adapter_config.json", "training_args.bin", "notes.txt", "evaluation.json", "model.gguf"),
    *("original/tokenizer.model", "onnx/tokenizer.json"),
)


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_companions_are_copied_byte_for_byte_and_nothing_else(tmp_path: Path) -> None:
    _write(tmp_path / "source", COMPANIONS | dict.fromkeys(OTHERS, "other"))
    out = tmp_path / "out"
    out.mkdir()
    copy_companions(tmp_path / "source", out)
    assert _files(out) == {name: text.encode() for name, text in COMPANIONS.items()}


def test_code_is_copied_only_for_models_that_run_it(tmp_path: Path) -> None:
    _write(tmp_path / "source", {"modeling.py": "x = 1", "vocab.txt": "a"})
    out = tmp_path / "out"
    out.mkdir()
    copy_companions(tmp_path / "source", out, code=True)
    assert set(_files(out)) == {"modeling.py", "vocab.txt"}


def test_links_of_the_hub_cache_are_copied_as_files(tmp_path: Path) -> None:
    _write(tmp_path, {"blobs/1234": "the vocabulary"})
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "tokenizer.json").symlink_to("../blobs/1234")
    out = tmp_path / "out"
    out.mkdir()
    copy_companions(tmp_path / "snapshot", out)
    assert not (out / "tokenizer.json").is_symlink()
    assert (out / "tokenizer.json").read_text() == "the vocabulary"


def test_unwritable_file_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "source", {"tokenizer.json": "{}"})
    with pytest.raises(OutputError, match=r"tokenizer\.json"):
        copy_companions(tmp_path / "source", tmp_path / "missing" / "out")


def test_vocabularies_of_all_transformers_decoders_are_companions(tmp_path: Path) -> None:
    names = {"tokenizer.json"}
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = tokenizer_class_from_name(TOKENIZER_MAPPING_NAMES.get(family) or "PreTrainedTokenizerFast")
        with suppress(ImportError):  # a class whose library is not installed
            names |= set((getattr(kind, "vocab_files_names", None) or {}).values())
    assert len(names) > 10
    _write(tmp_path / "source", dict.fromkeys(names, "{}"))
    (tmp_path / "out").mkdir()
    copy_companions(tmp_path / "source", tmp_path / "out")
    assert set(_files(tmp_path / "out")) == names


def test_files_of_transformers_4_are_copied_unchanged(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|user|>"]}
    _write(folder, {"tokenizer_config.json": json.dumps(settings), "generation_config.json": '{"top_k": 3}'})
    out = tmp_path / "out"
    out.mkdir()
    open_source(str(folder)).save_companions(out)
    expected = {name: text for name, text in _files(folder).items() if name not in ("config.json", "model.safetensors")}
    assert _files(out) == expected


def test_missing_generation_settings_are_written(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    (folder / "generation_config.json").unlink()
    out = tmp_path / "out"
    out.mkdir()
    open_source(str(folder)).save_companions(out)
    assert GenerationConfig.from_pretrained(out).eos_token_id == 0


def test_gguf_tokenizer_is_written_for_transformers_4(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "out"
    out.mkdir()
    open_source(str(tmp_path / "tiny.gguf")).save_companions(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    # Version 4 has no class TokenizersBackend, and expects a mapping under extra_special_tokens.
    assert settings["tokenizer_class"] in ("PreTrainedTokenizerFast", "GPT2Tokenizer", "LlamaTokenizer")
    assert not isinstance(settings.get("extra_special_tokens"), list)
    assert not settings.keys() & {"backend", "is_local", "local_files_only"}
    text = "The with statement<|endoftext|>"
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == tiny_tokenizer()(text).input_ids
