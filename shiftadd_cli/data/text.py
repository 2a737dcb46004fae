"""Named texts and text files, and windows of tokens drawn from them."""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from shiftadd_cli.data import text_builtin, text_files, text_hub
from shiftadd_cli.data.mixture import KINDS, is_mixture
from shiftadd_cli.data.windows import Windows, cut_windows
from shiftadd_cli.errors import CalibrationError
from shiftadd_cli.source.tokenizer import leading_tokens, tokens_as_text, unknown_token

Split = Literal["calibration", "test"]

# Longer texts are tokenised in pieces of about this many characters: a tokenizer uses some 500 bytes per token.
# WikiText-2's test split, with 1.29 million, is one piece.
PIECE_CHARACTERS = 3 << 19
# A tokenizer needs about 150 bytes per character while it works; a split line is harmless for random windows.
CALIBRATION_PIECE_CHARACTERS = 1 << 18

# Where a text is split, best first: before a line break that follows a word, or before whitespace with a line break.
# Pre-tokenizers join line breaks to adjacent whitespace and to preceding punctuation, but not to words.
_PARTINGS = (re.compile(r"(?<=\w)(?=\n)"), re.compile(r"(?<=\S)(?=\s*\n)"))


@dataclass(frozen=True)
class TextData:
    """A text: its name in reports, its content, and the SHA-256 of its UTF-8 bytes (hex)."""

    name: str
    text: str
    fingerprint: str


def load_text(spec: str, *, split: Split, tokenizer: Any = None) -> TextData:
    """The text called `spec`: `builtin`, `wikitext2`, `c4`, `ptb`, or a .txt, .jsonl or .parquet file.

    tokenizer: the model's tokenizer; files of conversations are read through its chat template.

    `split` chooses between disjoint parts of a named text. A file has no splits and is read whole for both, so the
    fingerprint shows whether calibration and test are the same text.

    Raises:
        CalibrationError: unknown name, no network, or a file that is missing, empty or unreadable.
    """
    if spec in KINDS:
        raise CalibrationError(f"{spec!r} is calibration text a model writes itself; give another text here.")
    if is_mixture(spec):
        raise CalibrationError(f"{spec!r} is a mixture of calibration texts; give one text here.")
    if spec == text_builtin.NAME:
        name, text = text_builtin.read(split)
    elif spec in text_hub.CORPORA:
        name, text = text_hub.read(spec, split)
    elif Path(spec).suffix.lower() in text_files.READERS or Path(spec).exists() or "/" in spec:
        name, text = text_files.read(Path(spec), tokenizer)
    else:
        raise CalibrationError(_unknown(spec, split))
    if not text.strip():
        raise CalibrationError(f"{name} holds no text; give a file with text in it.")
    try:
        return TextData(name, text, hashlib.sha256(text.encode()).hexdigest())
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{name} holds half a character (a lone surrogate, at character {error.start}); save it as valid UTF-8."
        ) from error


def tokenise(text: str, tokenizer: Any, piece_characters: int | None = None) -> torch.Tensor:
    """The tokens of `text` as one string, with no special tokens added: int64 `[tokens]`.

    Texts of more than `piece_characters` (by default `PIECE_CHARACTERS`) are tokenised in pieces that end before a line
    break. Where a line ends in a word, this changes no token for byte-level tokenizers. In other cases, it changes
    at most a token or two per piece.
    """
    pieces = []
    for piece in _pieces(text, piece_characters or PIECE_CHARACTERS):
        # verbose=False: long texts are intended here, so the warning about the model's length would mislead.
        encoded = tokenizer(piece, add_special_tokens=False, verbose=False)
        pieces.append(torch.tensor(encoded["input_ids"], dtype=torch.int64))
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def sample_windows(data: TextData, tokenizer: Any, *, samples: int, seq_len: int, seed: int) -> torch.Tensor:
    """Draw windows of tokens that do not overlap: int64 `[samples, seq_len]`.

    A permutation seeded with `seed` chooses among the windows of `text_windows`. The same text, tokenizer and seed give
    the same windows, and a smaller number of samples gives the first of a larger number.

    Raises:
        CalibrationError: the text has too few tokens.
    """
    tokens = tokenise(data.text, tokenizer, CALIBRATION_PIECE_CHARACTERS)
    windows = text_windows(tokens, tokenizer, seq_len, "`seq_len`")
    available = len(windows.whole)
    if available < samples:
        own = seq_len - len(windows.prefix)
        after_prefix = f" after {tokens_as_text(tokenizer, windows.prefix)}" if windows.prefix else ""
        raise CalibrationError(
            f"{samples} windows of {seq_len} tokens need {samples * own} tokens{after_prefix}, but {data.name} has "
            f"{len(tokens)}; give a longer text, or fewer or shorter windows"
            + (f" (at most {available} of this length)." if available else ".")
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:samples]
    return windows.whole[chosen]


def text_windows(tokens: torch.Tensor, tokenizer: Any, length: int, option: str) -> Windows:
    """The consecutive windows of a tokenised text, each beginning with the tokenizer's leading tokens.

    tokens: int64 `[n]`, without the leading ones; option: the option that sets the length.

    Raises:
        CalibrationError: the windows have no room for a token after the special ones.
    """
    prefix = leading_tokens(tokenizer)
    if length <= len(prefix):
        raise CalibrationError(
            f"Windows of {length} tokens hold nothing but {tokens_as_text(tokenizer, prefix)}, which the tokenizer "
            f"puts before a text; give a larger {option}."
        )
    return cut_windows(tokens, length, prefix)


def check_tokens(windows: Windows | torch.Tensor, tokenizer: Any, rows: int, *, data: str, model: str) -> None:
    """Refuse tokens outside the embedding of `model`, which has `rows` rows.

    Raises:
        CalibrationError: names the token, its id, and the number of rows.
    """
    pieces = [windows] if isinstance(windows, torch.Tensor) else [windows.whole, windows.rest]
    for piece in pieces:
        if unknown := unknown_token(piece, tokenizer, rows):
            raise CalibrationError(
                f"{data} has {unknown}, and the embedding of {model} has {rows:,} rows; take it out of the text, or "
                "give the model the tokenizer that it was trained with."
            )


def _pieces(text: str, size: int) -> list[str]:
    pieces, start = [], 0
    while start < len(text):
        end = start + size
        if end < len(text):
            matches = (parting.search(text, end, end + size) for parting in _PARTINGS)
            end = next((match.start() for match in matches if match), end)
        pieces.append(text[start:end])
        start = end
    return pieces


def _unknown(spec: str, split: Split) -> str:
    names = [*(KINDS if split == "calibration" else ()), text_builtin.NAME, *text_hub.CORPORA]
    near = difflib.get_close_matches(spec, names, n=1)
    guess = f" (did you mean {near[0]}?)" if near else ""
    return (
        f"There is no text called {spec!r}{guess}; give one of {', '.join(names)}, or the path of a "
        f"{text_files.KINDS} file."
    )
