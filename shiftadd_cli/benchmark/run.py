"""`benchmark`: from the names of models to a result."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shiftadd_cli.benchmark.layer_speed import LayerSpeed, layer_kinds, measure_layers
from shiftadd_cli.benchmark.machine import ASSUMED_CACHE_BYTES, Machine, free_memory
from shiftadd_cli.benchmark.model_speed import Candidate, measure_models
from shiftadd_cli.benchmark.result import Benchmark
from shiftadd_cli.benchmark.roof import Roof, better_roof, read_roof, roof_bytes
from shiftadd_cli.benchmark.work import Work, image_work, text_work
from shiftadd_cli.blockwise.forward import run_model
from shiftadd_cli.data.images import ImageReader
from shiftadd_cli.data.text import check_tokens, load_text, tokenise
from shiftadd_cli.device import dtype_name, use_threads
from shiftadd_cli.errors import RecipeError
from shiftadd_cli.runtime.opened import Loaded, Opened, computing_dtype, open_any
from shiftadd_cli.source.memory import trim

DEFAULT_LENGTHS = (128, 512)
DEFAULT_NEW_TOKENS = 64
DEFAULT_BATCHES = (1, 16)

_CPU = torch.device("cpu")


def benchmark(
    model: str,
    *,
    against: str | None = None,
    prompt_tokens: Sequence[int] | None = None,
    new_tokens: int | None = None,
    batch: int | None = None,
    rounds: int = 5,
    threads: int | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    layers: bool = True,
    show_progress: bool = True,
) -> Benchmark:
    """Measure how fast `model` runs on the CPU, optionally compared with the original that it was made from.

    All models are in memory at once and take turns.

    Args:
        model, against: names of originals or of shiftadd checkpoints, see `open_any`. The original is measured in its
            default dtype (see `computing_dtype`) and in float32.
        prompt_tokens: lengths of prompts; by default those of `DEFAULT_LENGTHS` that fit.
        new_tokens: tokens to generate, 2 or more; by default `DEFAULT_NEW_TOKENS`, or half of the positions if that is
            less.
        batch: prompts per batch, by default one; or images per batch, by default each of `DEFAULT_BATCHES`.
        threads: torch's threads; None leaves them unchanged.
        dtype: dtype of the computation of `model`.
        trust_remote_code: run model code that ships with a model.
        layers: also measure single layers and the memory bandwidth.

    Raises:
        ShiftaddError: a problem with a model, or lengths beyond a model's context.
    """
    count = use_threads(threads)
    opened = open_any(model, trust_remote_code=trust_remote_code)
    original = None if against is None else open_any(against, trust_remote_code=trust_remote_code)
    if original is not None and original.reads_images != opened.reads_images:
        raise RecipeError(f"{opened.spec} and {original.spec} cannot be compared: one reads images, the other text.")
    candidates = _candidates(opened, dtype, original)
    if opened.reads_images:
        if prompt_tokens is not None or new_tokens is not None:
            raise RecipeError(f"{opened.spec} is a vision model, which reads no prompt; leave out the lengths.")
        task = _look_at_images(candidates, batch)
    else:
        task = _read_and_write(candidates, prompt_tokens, new_tokens, batch or 1)
    speeds, first = measure_models(
        candidates, task.work, task.unit, task.touch, rounds=rounds, show_progress=show_progress
    )
    roof, layer_speeds = _layers(first, rounds, show_progress) if layers else (None, [])
    return Benchmark(
        machine=Machine.this(count),
        conditions=task.conditions,
        described=task.described,
        rounds=rounds,
        models=tuple(speeds),
        roof=roof,
        layers=tuple(layer_speeds),
    )


class _Task(NamedTuple):
    """The work of a benchmark and its description; see `measure_models` and `Benchmark`."""

    work: list[Work]
    unit: str
    touch: Callable[[Any], Any]
    conditions: dict[str, Any]
    described: str


def _read_and_write(
    candidates: Sequence[Candidate], prompt_tokens: Sequence[int] | None, new_tokens: int | None, batch: int
) -> _Task:
    limits = [limit for candidate in candidates if (limit := candidate.opened.positions) is not None]
    # The default leaves room for a prompt if there are few positions.
    new_tokens = new_tokens or max(2, min([DEFAULT_NEW_TOKENS, *(limit // 2 for limit in limits)]))
    lengths = _lengths(candidates, prompt_tokens, new_tokens)
    tokens = _prompt(candidates, max(lengths))
    listed = ", ".join(f"{n:,}" for n in lengths)
    return _Task(
        text_work(tokens, lengths, new_tokens, batch),
        "tokens",
        lambda model: model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False),
        {"prompt_tokens": list(lengths), "new_tokens": new_tokens, "batch": batch},
        f"batch of {batch}; prompts of {listed} tokens, {new_tokens:,} new ones after the shortest",
    )


def _look_at_images(candidates: Sequence[Candidate], batch: int | None) -> _Task:
    opened = {candidate.opened.spec: candidate.opened for candidate in candidates}
    blanks = {
        spec: ImageReader.of(model.load_image_processor(), model.config, spec).blank() for spec, model in opened.items()
    }
    (first, pixels), *others = blanks.items()
    for spec, other in others:
        if other.shape != pixels.shape:
            raise RecipeError(
                f"{spec} reads images of other sizes than {first}; give the original that it was made from."
            )
    batches = DEFAULT_BATCHES if batch is None else (batch,)
    shape = " x ".join(map(str, pixels.shape))
    return _Task(
        image_work(pixels, batches),
        "images",
        lambda model: run_model(model, pixels.unsqueeze(0).to(model.dtype)),
        {"batches": list(batches), "image": list(pixels.shape)},
        f"images of {shape}",
    )


def _candidates(opened: Opened, dtype: str, original: Opened | None) -> list[Candidate]:
    pairs = [(opened, computing_dtype(dtype, opened.stored_dtype, _CPU))]
    if original is not None:
        own = computing_dtype("auto", original.stored_dtype, _CPU)
        pairs += [(original, kind) for kind in dict.fromkeys((own, torch.float32))]
    names = [(model, dtype_name(kind)) for model, kind in pairs]
    return list(
        {(model.spec, kind): Candidate(f"{model.spec} in {kind}", model, kind) for model, kind in names}.values()
    )


def _lengths(candidates: Sequence[Candidate], requested: Sequence[int] | None, new_tokens: int) -> tuple[int, ...]:
    """Lengths of prompts, ascending; raises RecipeError for lengths beyond the context of a candidate."""
    limits = {candidate.name: candidate.opened.positions for candidate in candidates}
    tight = {name: limit for name, limit in limits.items() if limit is not None}
    if not tight:
        return tuple(sorted(set(requested or DEFAULT_LENGTHS)))
    name = min(tight, key=tight.__getitem__)
    limit = tight[name]
    if requested is None:
        usable = limit - new_tokens
        requested = [n for n in DEFAULT_LENGTHS if n <= limit] if usable >= min(DEFAULT_LENGTHS) else [max(1, usable)]
    lengths = tuple(sorted(set(requested)))
    context = f"beyond the context of {limit:,} tokens of {name}; give smaller `prompt_tokens`"
    if lengths[-1] > limit:
        raise RecipeError(f"A prompt of {lengths[-1]:,} tokens is {context}.")
    if lengths[0] + new_tokens > limit:
        raise RecipeError(
            f"A prompt of {lengths[0]:,} tokens and {new_tokens:,} new ones are {context} or `new_tokens`."
        )
    return lengths


def _prompt(candidates: Sequence[Candidate], length: int) -> Tensor:
    """The first tokens of the builtin test text, repeated if it is too short: int64 `[length]`."""
    tokenizer = candidates[0].opened.load_tokenizer()
    tokens = tokenise(load_text("builtin", split="test").text, tokenizer)
    tokens = tokens.repeat(-(-length // len(tokens)))[:length]
    first = candidates[0].opened
    check_tokens(tokens, tokenizer, first.vocab_size, data="The prompt", model=first.spec)
    for candidate in candidates[1:]:
        if int(tokens.max()) >= candidate.opened.vocab_size:
            raise RecipeError(
                f"{candidate.opened.spec} does not know all tokens of {first.spec}; give the original that it was made "
                "from."
            )
    return tokens


def _layers(first: Loaded, rounds: int, show_progress: bool) -> tuple[Roof, list[LayerSpeed]]:
    """Speeds of single layers, and the better of two measurements of the memory bandwidth, before and after them."""
    # `measure_models` has released the originals; their memory is needed for copies of layers.
    gc.collect()
    trim()
    machine_cache, free = Machine.this(0).cache_bytes or ASSUMED_CACHE_BYTES, free_memory()
    nbytes = roof_bytes(machine_cache, free)
    before = read_roof(nbytes)
    speeds = measure_layers(
        layer_kinds(first.model),
        getattr(torch, first.info.dtype),
        rounds=rounds,
        cache_bytes=machine_cache,
        free_bytes=free,
        show_progress=show_progress,
    )
    return better_roof(before, read_roof(nbytes)), speeds
