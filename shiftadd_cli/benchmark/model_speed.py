"""Whole models: how fast they load, read prompts and write, and the memory their weights take."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from shiftadd_cli.benchmark.machine import resident_memory
from shiftadd_cli.benchmark.timing import Clock, Span, Spread, Timed, interleave
from shiftadd_cli.evaluation.models import Loaded, ModelInfo, Opened
from shiftadd_cli.source.memory import trim


@dataclass(frozen=True)
class ModelSpeed:
    """One candidate.

    Attributes:
        name: its spec and dtype.
        load: of the weights, with their files in the system's page cache.
        prefill: by length of the prompt: until the first new token; amounts are tokens of the prompts.
        decode: from the first new token to the last, with a KV cache; the amount is tokens.
        weight_bytes: all tensors of the loaded model, each once.
        resident_bytes: by which the process grew on loading it; None where the system does not say.
    """

    name: str
    info: ModelInfo
    load: Timed
    prefill: dict[int, Timed]
    decode: Timed
    weight_bytes: int
    resident_bytes: Spread | None

    def gains_over(self, other: ModelSpeed) -> dict[str, Spread]:
        """How many times as good as `other` it is in each round, above 1 for faster, smaller and sooner loaded."""
        gains = {"decode": self.decode.rate.over(other.decode.rate)}
        gains |= {f"prefill of {n}": self.prefill[n].rate.over(other.prefill[n].rate) for n in self.prefill}
        gains["load"] = other.load.seconds.over(self.load.seconds)
        gains["weights in memory"] = Spread((other.weight_bytes / self.weight_bytes,))
        gains["size on disk"] = Spread((other.info.file_bytes / self.info.file_bytes,))
        return gains

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **asdict(self.info),
            "decode_tokens_per_second": self.decode.rate.to_dict(),
            "prefill_tokens_per_second": {str(n): each.rate.to_dict() for n, each in self.prefill.items()},
            "load_seconds": self.load.seconds.to_dict(),
            "weight_bytes": self.weight_bytes,
            "resident_bytes": self.resident_bytes and self.resident_bytes.to_dict(),
            "times": {
                "load": self.load.to_dict(),
                "prefill": {str(n): each.to_dict() for n, each in self.prefill.items()},
                "decode": self.decode.to_dict(),
            },
        }


class Candidate(NamedTuple):
    """A model to measure in one dtype; only its headers have been read."""

    name: str
    opened: Opened
    dtype: str


def measure_models(
    candidates: Sequence[Candidate],
    tokens: Tensor,
    *,
    lengths: Sequence[int],
    new_tokens: int,
    batch: int,
    rounds: int,
    clock: Clock | None = None,
    show_progress: bool = True,
) -> tuple[list[ModelSpeed], Loaded]:
    """Speeds of all candidates, which take turns in every round, and the first of them loaded.

    Each candidate is loaded anew in every round. After the last, all are in memory and take turns at reading prompts of
    each length and writing; new tokens but the first are made after the shortest prompt only.

    tokens: `[n]`, the longest prompt at least; a prompt is the first of them, `batch` times.
    """
    clock = clock or Clock()
    loaders = {each.name: _Loader(each, clock) for each in candidates}
    loads = interleave(loaders, rounds, desc="Loading" if show_progress else None)
    shortest = min(lengths)
    work = {
        (name, length): partial(
            time_generation,
            loader.model,
            tokens[:length].expand(batch, length),
            new_tokens if length == shortest else 1,
            clock,
        )
        for length in lengths
        for name, loader in loaders.items()
    }
    runs = interleave(work, rounds, desc="Generating" if show_progress else None)
    speeds = []
    for name, loader in loaders.items():
        grown = [each.grown for each in loads[name] if each.grown is not None]
        decoded = [decode for _, decode in runs[name, shortest]]
        speeds.append(
            ModelSpeed(
                name=name,
                info=loader.loaded.info,
                load=Timed(tuple(each.span for each in loads[name])),
                prefill={n: Timed(tuple(prefill for prefill, _ in runs[name, n]), amount=batch * n) for n in lengths},
                decode=Timed(tuple(decoded), amount=batch * (new_tokens - 1)),
                weight_bytes=weight_bytes(loader.model),
                resident_bytes=Spread(tuple(map(float, grown))) if grown else None,
            )
        )
    return speeds, loaders[candidates[0].name].loaded


def time_generation(model: Any, prompts: Tensor, new_tokens: int, clock: Clock) -> tuple[Span, Span]:
    """Times until the first new token, and from there to the last, of `prompts` `[batch, length]`.

    transformers generates, greedily and with its KV cache; no token ends a text before it is as long as wanted.
    """
    # Nothing the checkpoint brings along may stop early or add work, see `generation.run`.
    model.generation_config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    marks = _Marks(clock)
    start = clock.now()
    model.generate(prompts, attention_mask=torch.ones_like(prompts), logits_processor=LogitsProcessorList([marks]))
    assert len(marks.seen) == new_tokens
    return marks.seen[0] - start, marks.seen[-1] - marks.seen[0]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a model and its modules hold, those in several places once."""
    sizes = {}
    for module in model.modules():
        held = (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values())
        for tensor in held:
            if isinstance(tensor, Tensor):
                sizes[tensor.data_ptr(), tensor.device] = tensor.nbytes
    return sum(sizes.values())


class _Marks(LogitsProcessor):
    """Notes when each token's logits are there: unlike a streamer it is also told of batches."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seen: list[Span] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(self._clock.now())
        return scores


class _Load(NamedTuple):
    span: Span
    grown: int | None


class _Loader:
    """Loads a candidate each time it is called, in the place of what it loaded before."""

    def __init__(self, candidate: Candidate, clock: Clock) -> None:
        self._candidate, self._clock = candidate, clock
        self._loaded: Loaded | None = None

    @property
    def loaded(self) -> Loaded:
        assert self._loaded is not None
        return self._loaded

    @property
    def model(self) -> Any:
        return self.loaded.model

    def __call__(self) -> _Load:
        self._loaded = None
        before = _settled_memory()
        start = self._clock.now()
        self._loaded = self._candidate.opened.load(self._candidate.dtype)
        span = self._clock.now() - start
        # A layer may set something up when it is first used, and files may be mapped and not read yet.
        with torch.inference_mode():
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
        after = _settled_memory()
        return _Load(span, None if before is None or after is None else after - before)


def _settled_memory() -> int | None:
    gc.collect()
    trim()
    return resident_memory()
