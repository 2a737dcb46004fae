"""Windows of text that a model writes itself. Pieces in which it falls into a loop are rewritten."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from shiftadd_cli.cache import CacheFile, cache_folder
from shiftadd_cli.data import text_builtin
from shiftadd_cli.data.mixture import KINDS, Kind, parse_mixture, parts_with_windows, text_of_shares
from shiftadd_cli.errors import CalibrationError, NumericalError, first_line
from shiftadd_cli.progress import no_library_bar, progress
from shiftadd_cli.recipe import NO_CALIBRATION, Recipe
from shiftadd_cli.runtime.kv_cache import grown_capacity
from shiftadd_cli.self_text.authors import Author, ChatAuthor, ChatForm, DocumentAuthor, Vocabulary
from shiftadd_cli.self_text.decode import Sampler, write_rows
from shiftadd_cli.self_text.repetition import is_degenerate
from shiftadd_cli.source import Source
from shiftadd_cli.source.memory import trim
from shiftadd_cli.source.tokenizer import end_tokens

# Share of extra pieces written: they cost little compared with the others, and a second round takes as many steps as
# the first.
SPARE = 1 / 32
ROUNDS = 6
# Upper limit for the keys, values and logits of pieces written at once. A larger limit would be faster, but writing
# would then need more memory than any other step of a small model.
ROOM_BYTES = 900 << 20
# Copies of the logits of a step: as computed, in float32, summed up, and with one token left.
_LOGIT_COPIES = 4
# Increased whenever the same request yields another text.
_VERSION = 2


@dataclass(frozen=True)
class Request:
    """The requested text: `samples` windows of `seq_len` tokens.

    Attributes:
        kinds: kinds of windows, which alternate; one of `KINDS`.
        piece: tokens written in one go; a window consists of as many pieces as it needs. Short pieces loop less and
            cover more topics, but have less context.
        temperature, min_p: see `Sampler`.
        seed: seed of all random draws.
    """

    kinds: tuple[Kind, ...]
    samples: int
    seq_len: int
    piece: int
    temperature: float
    min_p: float
    seed: int

    @property
    def pieces(self) -> int:
        """Pieces per window."""
        return -(-self.seq_len // self.piece)

    @property
    def piece_length(self) -> int:
        """Tokens per piece: as few as fill a window, at most `piece`."""
        return -(-self.seq_len // self.pieces)


def writing_request(recipe: Recipe, spec: str, samples: int) -> Request:
    """The recipe's request for `samples` windows of the text `spec`, one of `KINDS`."""
    return Request(
        KINDS[spec],
        samples,
        recipe.seq_len,
        recipe.writing_length,
        recipe.writing_temperature,
        recipe.writing_min_p,
        recipe.seed,
    )


def written_by_model(recipe: Recipe) -> list[Request]:
    """The requests for text that the model writes, in the calibration text of a recipe; other texts have none."""
    if recipe.calibration == NO_CALIBRATION:
        return []
    parts = parts_with_windows(recipe.calibration, recipe.samples)
    return [writing_request(recipe, part.spec, count) for part, count in parts if part.spec in KINDS]


def without_self(calibration: str) -> str:
    """The same calibration text, with the builtin text in place of the model's own text."""
    shares: dict[str, float] = {}
    for part in parse_mixture(calibration):
        name = text_builtin.NAME if part.spec in KINDS else part.spec
        shares[name] = shares.get(name, 0.0) + part.share
    return text_of_shares(shares)


def row_bytes(source: Source, length: int) -> int:
    """Bytes that a piece of `length` tokens needs while it is written: buffers of keys and values, and logits."""
    config = source.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = (getattr(config, "num_key_value_heads", None) or heads) * size
    cache_bytes: int = 2 * config.num_hidden_layers * width * grown_capacity(length) * source.dtype.itemsize
    return cache_bytes + 4 * _LOGIT_COPIES * config.vocab_size


def writing_bytes(source: Source, request: Request) -> int:
    """Expected memory for writing, in bytes: the whole model, and the pieces written at once."""
    rows = min(_rows_at_once(source, request), _with_spare(request.samples * request.pieces))
    return source.model_bytes + rows * row_bytes(source, request.piece_length)


def why_not(source: Source, request: Request, limit: int) -> str | None:
    """Why a model does not write its own text, as a clause; None where it does. limit: memory limit, in bytes."""
    if not hasattr(type(source.skeleton()), "generate"):
        return f"{type(source.skeleton()).__name__} has no method `generate`"
    needed = writing_bytes(source, request)
    if needed > limit:
        return f"the whole model would be in memory, about {needed / 1e9:.1f} GB of the {limit / 1e9:.1f} GB available"
    return None


@dataclass(frozen=True)
class WritingTokens:
    """The tokens for writing with a model: its vocabulary, and its chat form (None without conversations)."""

    vocabulary: Vocabulary
    form: ChatForm | None

    @classmethod
    def of(cls, source: Source) -> WritingTokens:
        """Raises CalibrationError where no token can begin a text."""
        tokenizer, config = source.load_tokenizer(), source.config
        vocabulary = Vocabulary.of(tokenizer, config.get_text_config().vocab_size, end_tokens(config, tokenizer))
        return cls(vocabulary, ChatForm.of(tokenizer, vocabulary))

    def kinds(self, request: Request, name: str) -> tuple[Kind, ...]:
        """The requested kinds of windows that can be written. name: name of the model, for messages.

        Conversations need a chat template that leaves the model at least half of a piece.

        Raises:
            CalibrationError: none can be written.
        """
        length, cure = request.piece_length, "give `calibration=self-plain`, or a file"
        talks = self.form is not None and 2 * len(self.form.opening) <= length
        kinds = tuple(kind for kind in request.kinds if kind == "documents" or talks)
        if kinds:
            return kinds
        if self.form is None:
            raise CalibrationError(
                f"The tokenizer of {name} has no chat template that shows the model where a message ends, so it cannot "
                f"write conversations; {cure}."
            )
        raise CalibrationError(
            f"The chat template of {name} begins a conversation with {len(self.form.opening)} tokens, which leaves too "
            f"few of the {length} tokens of a piece; give a larger `writing_length`, or {cure}."
        )


def write_windows(source: Source, writing: WritingTokens, request: Request, device: torch.device) -> Tensor:
    """The windows, int64 `[samples, seq_len]`: cached by an earlier run, or written now and cached.

    source: the model's source, at the compute dtype; writing: its tokens. The same request gives the same windows on
    the same machine with the same number of threads.

    Raises:
        CalibrationError: only conversations are requested and the model has no form for them, the model cannot be run,
            or it writes little except loops.
        NumericalError: the model gives logits that are not finite.
    """
    kinds = writing.kinds(request, source.spec)
    file = _file(source, request, device, writing)
    cached = _cached_windows(file, request, writing.vocabulary)
    if cached is not None:
        return cached
    with no_library_bar():
        model: Any = source.load_model()
    model.to(device).eval()
    try:
        with torch.inference_mode():
            written = _Writer(model, writing, kinds, request, _rows_at_once(source, request)).windows(source.spec)
    finally:
        del model
        trim()
    # Tensors from inference mode cannot be used in autograd.
    windows = written.clone()
    file.write(save({"tokens": windows.to(torch.int32)}))
    return windows


@dataclass
class _Writer:
    model: Any
    writing: WritingTokens
    kinds: Sequence[Kind]
    request: Request
    at_once: int

    def windows(self, name: str) -> Tensor:
        """The windows, int64 `[samples, seq_len]`. name: name of the model, for messages."""
        request, count = self.request, self.request.pieces
        # Each kind is counted separately, so that a kind that loops more often keeps its share.
        targets = [count * len(range(index, request.samples, len(self.kinds))) for index in range(len(self.kinds))]
        pieces: list[list[Tensor]] = [[] for _ in self.kinds]
        for number in range(ROUNDS):
            missing = [target - len(finished) for target, finished in zip(targets, pieces, strict=True)]
            if not any(missing):
                break
            kind_indices = [index for index, total in enumerate(missing) for _ in range(_with_spare(total))]
            try:
                written = self._write(kind_indices, number)
            except (CalibrationError, NumericalError):
                raise
            except Exception as error:  # model code can raise anything
                raise CalibrationError(
                    f"{name} cannot write its own calibration text ({first_line(error)}); give `calibration` a file, "
                    "or builtin."
                ) from error
            for index, piece in zip(kind_indices, written, strict=True):
                if len(pieces[index]) < targets[index] and not is_degenerate(piece):
                    pieces[index].append(piece)
        if any(len(finished) < target for finished, target in zip(pieces, targets, strict=True)):
            raise CalibrationError(
                f"{name} repeats itself in nearly all of its text, so it cannot be calibrated on it; give "
                "`calibration` a file, or builtin, or a higher `writing_temperature`."
            )
        windows = []
        for sample in range(request.samples):
            number, index = divmod(sample, len(self.kinds))
            windows.append(torch.cat(pieces[index][number * count : (number + 1) * count])[: request.seq_len])
        return torch.stack(windows)

    def _write(self, kind_indices: Sequence[int], number: int) -> list[Tensor]:
        """One piece of each kind in `kind_indices`, in round `number`."""
        batches = -(-len(kind_indices) // self.at_once)
        size = -(-len(kind_indices) // batches)
        length = self.request.piece_length
        again = "" if number == 0 else ", replacing loops"
        total = batches * (length - 1)
        ticks = iter(progress(range(total), total, f"Writing the calibration text{again}"))
        # The bar counts an item when the next one is requested.
        next(ticks, None)
        pieces: list[Tensor] = []
        for batch in range(batches):
            generator = _generator(self.request.seed, number, batch)
            authors = [
                self._author(self.kinds[index], generator, row)
                for row, index in enumerate(kind_indices[batch * size : (batch + 1) * size])
            ]
            sampler = Sampler(self.request.temperature, self.request.min_p, generator)
            pieces += write_rows(self.model, authors, self.writing.vocabulary.stops, length, sampler, ticks)
        return pieces

    def _author(self, kind: Kind, generator: torch.Generator, row: int) -> Author:
        if kind == "documents":
            return DocumentAuthor(self.writing.vocabulary, generator, row)
        assert self.writing.form is not None, "conversations need a chat form"
        return ChatAuthor(self.writing.form, self.writing.vocabulary.stops)


def _rows_at_once(source: Source, request: Request) -> int:
    return max(1, ROOM_BYTES // row_bytes(source, request.piece_length))


def _with_spare(count: int) -> int:
    return count + math.ceil(SPARE * count)


def _generator(*numbers: int) -> torch.Generator:
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _file(source: Source, request: Request, device: torch.device, writing: WritingTokens) -> CacheFile:
    from transformers import __version__ as transformers_version

    vocabulary = writing.vocabulary
    inputs = {
        "version": _VERSION,
        "libraries": [torch.__version__, transformers_version],
        "model": source.fingerprint,
        "computed": [str(source.dtype), device.type],
        "request": asdict(request),
        "vocabulary": [vocabulary.leading, sorted(vocabulary.stops), vocabulary.first, vocabulary.size],
        "form": None if writing.form is None else asdict(writing.form),
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return CacheFile(
        cache_folder() / "self-texts" / f"{key}.safetensors",
        content="calibration texts",
        loss="so another run will write the text again",
    )


def _cached_windows(file: CacheFile, request: Request, vocabulary: Vocabulary) -> Tensor | None:
    content = file.read()
    if content is None:
        return None
    try:
        windows = load(content)["tokens"].long()
    except (SafetensorError, KeyError):
        return None
    fits = windows.shape == (request.samples, request.seq_len) and bool((windows >= 0).all())
    return windows if fits and int(windows.max()) < vocabulary.size else None
