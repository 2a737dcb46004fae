"""Windows of text that a model writes itself. A piece in which it fell into a loop is written again."""

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
from shiftadd_cli.self_text.authors import Author, ChatAuthor, ChatForm, DocumentAuthor, Vocabulary
from shiftadd_cli.self_text.decode import Sampler, write_rows
from shiftadd_cli.self_text.repetition import is_degenerate
from shiftadd_cli.source import Source
from shiftadd_cli.source.memory import trim
from shiftadd_cli.source.tokenizer import end_tokens

# So many more pieces are written than are wanted: they cost little beside the others, and a second round takes as many
# steps as the first.
SPARE = 1 / 32
ROUNDS = 6
# Keys, values and logits of pieces that are written at once take so many bytes: more would be faster, and make writing
# the step of a small model that takes most memory.
ROOM_BYTES = 1 << 30
# Copies of the logits of a step: as they are computed, in float32, summed up, and with one token left.
_LOGIT_COPIES = 4
# Raised whenever the same request is answered by another text.
_VERSION = 2


@dataclass(frozen=True)
class Request:
    """The text that is wanted: `samples` windows of `seq_len` tokens.

    Attributes:
        kinds: of windows, which take turns; one of `KINDS`.
        piece: tokens that are written at a stretch; a window is as many pieces as it takes. Short pieces loop less, are
            about more, and attend to less.
        temperature, min_p: see `Sampler`.
        seed: of everything that is drawn.
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
        """Pieces of a window."""
        return -(-self.seq_len // self.piece)

    @property
    def piece_length(self) -> int:
        """Tokens of each piece: as few as fill a window, and `piece` at most."""
        return -(-self.seq_len // self.pieces)


def writing_request(recipe: Recipe, spec: str, samples: int) -> Request:
    """What a recipe asks of the text called `spec`, one of `KINDS`, for so many windows."""
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
    """What the model is to write for the calibration text of a recipe; nothing for texts of other kinds."""
    if recipe.calibration == NO_CALIBRATION:
        return []
    parts = parts_with_windows(recipe.calibration, recipe.samples)
    return [writing_request(recipe, part.spec, count) for part, count in parts if part.spec in KINDS]


def without_self(calibration: str) -> str:
    """The same calibration text with the builtin one in place of what the model would write."""
    shares: dict[str, float] = {}
    for part in parse_mixture(calibration):
        name = text_builtin.NAME if part.spec in KINDS else part.spec
        shares[name] = shares.get(name, 0.0) + part.share
    return text_of_shares(shares)


def row_bytes(source: Source, length: int) -> int:
    """What a piece of so many tokens takes while it is written: keys and values with room for more, and logits."""
    config = source.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = (getattr(config, "num_key_value_heads", None) or heads) * size
    held = 2 * config.num_hidden_layers * width * length * source.dtype.itemsize
    return int(1.25 * held) + 4 * _LOGIT_COPIES * config.vocab_size


def writing_bytes(source: Source, request: Request) -> int:
    """Expected memory of writing, in bytes: the whole model, and the pieces that are written at once."""
    rows = min(_rows_at_once(source, request), _with_spare(request.samples * request.pieces))
    return source.model_bytes + rows * row_bytes(source, request.piece_length)


def why_not(source: Source, request: Request, limit: int) -> str | None:
    """Why a model does not write its own text, as a clause; None where it does. limit: of memory, in bytes."""
    if not hasattr(type(source.skeleton()), "generate"):
        return f"{type(source.skeleton()).__name__} has no method `generate`"
    needed = writing_bytes(source, request)
    if needed > limit:
        return f"the whole model would be in memory, about {needed / 1e9:.1f} GB of the {limit / 1e9:.1f} GB there are"
    return None


@dataclass(frozen=True)
class WritingTokens:
    """The tokens that a model writes with: its vocabulary, and the form of its conversations (None without)."""

    vocabulary: Vocabulary
    form: ChatForm | None

    @classmethod
    def of(cls, source: Source) -> WritingTokens:
        """Raises CalibrationError where no text can begin."""
        tokenizer, config = source.load_tokenizer(), source.config
        vocabulary = Vocabulary.of(tokenizer, config.get_text_config().vocab_size, end_tokens(config, tokenizer))
        return cls(vocabulary, ChatForm.of(tokenizer, vocabulary))

    def kinds(self, request: Request, name: str) -> tuple[Kind, ...]:
        """The kinds of windows that are asked for and can be written. name: of the model, for messages.

        Conversations need a chat template that leaves the model at least half of a piece.

        Raises:
            CalibrationError: there are none.
        """
        length, cure = request.piece_length, "give `calibration=self-plain`, or a file"
        talks = self.form is not None and 2 * len(self.form.opening) <= length
        found = tuple(kind for kind in request.kinds if kind == "documents" or talks)
        if found:
            return found
        if self.form is None:
            raise CalibrationError(
                f"The tokenizer of {name} has no chat template that shows the model where a message ends, so it cannot "
                f"write conversations; {cure}."
            )
        raise CalibrationError(
            f"The chat template of {name} begins a conversation with {len(self.form.opening)} tokens, which leaves too "
            f"few of the {length} that are written at a stretch; give a larger `writing_length`, or {cure}."
        )


def write_windows(source: Source, writing: WritingTokens, request: Request, device: torch.device) -> Tensor:
    """The windows, int64 `[samples, seq_len]`: those kept from an earlier run, or written now and kept.

    source: of the model, at the dtype that is computed in; writing: its tokens. The same request gives the same windows
    on the same machine with the same threads.

    Raises:
        CalibrationError: conversations alone are wanted and there is no form for them, the model cannot be run, or it
            writes little but loops.
        NumericalError: the model gives logits that are not numbers.
    """
    kinds = writing.kinds(request, source.spec)
    file = _file(source, request, device, writing)
    kept = _kept(file, request, writing.vocabulary)
    if kept is not None:
        return kept
    with no_library_bar():
        model: Any = source.load_model()
    model.to(device).eval()
    try:
        with torch.inference_mode():
            written = _Writer(model, writing, kinds, request, _rows_at_once(source, request)).windows(source.spec)
    finally:
        del model
        trim()
    # Tensors of inference mode cannot take part in what is tuned by gradient.
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
        """int64 `[samples, seq_len]`. name: of the model, for messages."""
        request, count = self.request, self.request.pieces
        # Each kind by itself, so that one that loops more often has no smaller share.
        wanted = [count * len(range(place, request.samples, len(self.kinds))) for place in range(len(self.kinds))]
        pieces: list[list[Tensor]] = [[] for _ in self.kinds]
        for number in range(ROUNDS):
            missing = [total - len(have) for total, have in zip(wanted, pieces, strict=True)]
            if not any(missing):
                break
            places = [place for place, total in enumerate(missing) for _ in range(_with_spare(total))]
            try:
                written = self._write(places, number)
            except (CalibrationError, NumericalError):
                raise
            except Exception as error:  # a model's code raises whatever it is led to
                raise CalibrationError(
                    f"{name} cannot write its own calibration text ({first_line(error)}); give `calibration` a file, "
                    "or builtin."
                ) from error
            for place, piece in zip(places, written, strict=True):
                if len(pieces[place]) < wanted[place] and not is_degenerate(piece):
                    pieces[place].append(piece)
        if any(len(have) < total for have, total in zip(pieces, wanted, strict=True)):
            raise CalibrationError(
                f"{name} repeats itself in nearly all that it writes, which is no text to calibrate on; give "
                "`calibration` a file, or builtin, or a higher `writing_temperature`."
            )
        windows = []
        for sample in range(request.samples):
            number, place = divmod(sample, len(self.kinds))
            windows.append(torch.cat(pieces[place][number * count : (number + 1) * count])[: request.seq_len])
        return torch.stack(windows)

    def _write(self, places: Sequence[int], number: int) -> list[Tensor]:
        """A piece of the kind at each place, in round `number`."""
        batches = -(-len(places) // self.at_once)
        size = -(-len(places) // batches)
        length = self.request.piece_length
        again = "" if number == 0 else ", in place of what loops"
        total = batches * (length - 1)
        ticks = iter(progress(range(total), total, f"Writing the calibration text{again}"))
        # The bar counts an item when the next one is asked for.
        next(ticks, None)
        pieces: list[Tensor] = []
        for batch in range(batches):
            generator = _generator(self.request.seed, number, batch)
            authors = [
                self._author(self.kinds[place], generator, row)
                for row, place in enumerate(places[batch * size : (batch + 1) * size])
            ]
            sampler = Sampler(self.request.temperature, self.request.min_p, generator)
            pieces += write_rows(self.model, authors, self.writing.vocabulary.stops, length, sampler, ticks)
        return pieces

    def _author(self, kind: Kind, generator: torch.Generator, row: int) -> Author:
        if kind == "documents":
            return DocumentAuthor(self.writing.vocabulary, generator, row)
        assert self.writing.form is not None, "conversations are written in a form"
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
    made = {
        "version": _VERSION,
        "libraries": [torch.__version__, transformers_version],
        "model": source.fingerprint,
        "computed": [str(source.dtype), device.type],
        "request": asdict(request),
        "vocabulary": [vocabulary.leading, sorted(vocabulary.stops), vocabulary.first, vocabulary.size],
        "form": None if writing.form is None else asdict(writing.form),
    }
    key = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    return CacheFile(
        cache_folder() / "self-texts" / f"{key}.safetensors",
        content="calibration texts",
        loss="so another run will have the model write its text again",
    )


def _kept(file: CacheFile, request: Request, vocabulary: Vocabulary) -> Tensor | None:
    content = file.read()
    if content is None:
        return None
    try:
        windows = load(content)["tokens"].long()
    except (SafetensorError, KeyError):
        return None
    fits = windows.shape == (request.samples, request.seq_len) and bool((windows >= 0).all())
    return windows if fits and int(windows.max()) < vocabulary.size else None
