"""A tokenizer as metadata of a GGUF file. Only byte-level BPE is supported: GGUF names its splitting rules."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from shiftadd_cli.errors import ExportError

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
_SPECIAL = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True)
class GgufTokenizer:
    """Everything llama.cpp needs to split text as the original does.

    Attributes:
        split: llama.cpp's name of the rule that splits text before merging.
        tokens: texts by id; types: ggml's token types; merges: `left right`, best first.
        special: ids of `bos`, `eos`, `unk` and `pad`, if present; chat_template: its text, or None.
        adds_bos, adds_eos: whether encoding a text adds them.
    """

    split: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: dict[str, int]
    chat_template: str | None
    adds_bos: bool
    adds_eos: bool

    @classmethod
    def read(cls, tokenizer: Any, vocab_size: int) -> GgufTokenizer:
        """From a transformers tokenizer; unused ids up to `vocab_size` get placeholders.

        Raises ExportError for any kind other than byte-level BPE, and for rules without a known name.
        """
        import gguf

        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = {} if backend is None else json.loads(backend.to_str())
        model = parts.get("model", {})
        if model.get("type") != "BPE" or model.get("byte_fallback"):
            raise _refusal("is not byte-level BPE")
        split = _split_name(parts)
        control, own, unused = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED
        tokens = [f"[PAD{index}]" for index in range(vocab_size)]
        types = [int(unused)] * vocab_size
        entries = [(text, index, int(gguf.TokenType.NORMAL)) for text, index in model["vocab"].items()]
        entries += [
            (token["content"], token["id"], int(control if token["special"] else own))
            for token in parts["added_tokens"]
        ]
        for text, index, kind in entries:
            if index >= vocab_size:
                raise _refusal(f"has the id {index}, but the model knows {vocab_size}")
            tokens[index], types[index] = text, kind
        merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
        bare, full = (tokenizer.encode("a", add_special_tokens=added) for added in (False, True))
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL}
        template = tokenizer.chat_template
        return cls(
            split=split,
            tokens=tuple(tokens),
            types=tuple(types),
            merges=tuple(merges),
            special={name: index for name, index in ids.items() if index is not None},
            chat_template=template if isinstance(template, str) else None,
            adds_bos=len(full) > len(bare) and full[0] == ids["bos"],
            adds_eos=len(full) > len(bare) and full[-1] == ids["eos"],
        )

    def add_to(self, writer: Any) -> None:
        """Add it to the metadata of a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        writer.add_token_merges(list(self.merges))
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def _split_name(parts: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if (parts.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise _refusal("changes text before splitting it")
    first = parts.get("pre_tokenizer") or {}
    steps = first["pretokenizers"] if first.get("type") == "Sequence" else [first]
    *before, last = steps
    if not _BYTE_LEVEL.items() <= last.items():
        raise _refusal("is not byte-level BPE")
    if last.get("use_regex", True):
        if not before:
            return "gpt-2"
        if len(before) == 1 and before[0] == {"type": "Digits", "individual_digits": True}:
            return "smollm"
    elif len(before) == 1 and before[0].get("type") == "Split" and before[0]["behavior"] == "Isolated":
        pattern = before[0]["pattern"].get("Regex")
        for name in ("llama-bpe", "qwen2", "tekken", "gpt-4o"):
            if GGUF_PRE_TOKENIZER_SPLITS[name] == pattern:
                return name
    raise _refusal("splits text by a rule that has no name in GGUF")


def _refusal(reason: str) -> ExportError:
    return ExportError(
        f"The tokenizer {reason}, so it cannot be exported to GGUF; export with `format=dense` and convert the result "
        "with llama.cpp's convert_hf_to_gguf.py."
    )
