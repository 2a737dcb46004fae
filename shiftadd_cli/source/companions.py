"""The small files of a model: tokenizer, image processor and generation settings.

Files of a model folder are copied byte for byte. transformers would rewrite them with class names and keys that
earlier versions do not know.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shiftadd_cli.storage.refusals import refusals

GENERATION_FILE = "generation_config.json"
# Newer versions of transformers use the second, for an image processor together with settings of other inputs.
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# Relative to the folder. No pattern matches weights or a file name that our checkpoints use themselves.
_PATTERNS = (
    GENERATION_FILE,
    *IMAGE_PROCESSOR_FILES,
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    # Vocabularies, as named by the tokenizers of transformers.
    "vocab*.json",
    "vocab*.txt",
    "merges*.txt",
    "dict.txt",
    "bpe.codes",
    "spiece.model",
    "spm*.model",
    "sentencepiece*.model",
    "tokenizer.model*",
    "source.spm",
    "target.spm",
    "tekken.json",
    "*.tiktoken",
    "byte_maps.json",
    "normalizer.json",
    "emoji.json",
    "entity_vocab.json",
    "word_shape.json",
    "word_pronunciation.json",
    "prophetnet.tokenizer",
)


def copy_companions(source: Path, folder: Path, *, code: bool = False) -> None:
    """Copy all small files except the configuration from the model folder `source` to `folder`, byte for byte.

    code: also copy Python files, for a model that brings its own code.

    Raises OutputError if a file cannot be written.
    """
    for path in _companions(source, code):
        copy = folder / path.relative_to(source)
        with refusals(copy):
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer that comes from a GGUF file and so has no files of its own, so that transformers 4 reads it
    too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # These describe how this machine read it.
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_generation_settings(config: Any, folder: Path) -> None:
    """Write the generation settings from the model's configuration if `folder` has none."""
    from transformers import GenerationConfig

    if not (folder / GENERATION_FILE).is_file():
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def _companions(source: Path, code: bool) -> Iterator[Path]:
    """Each file once, in an order that does not depend on the file system."""
    patterns = (*_PATTERNS, *(["*.py"] if code else []))
    files = {path for pattern in patterns for path in source.glob(pattern)}
    yield from (path for path in sorted(files) if path.is_file())
