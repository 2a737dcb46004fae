"""Full models: how fast they load and run, and the memory of their weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shiftadd_cli.benchmark.machine import resident_memory
from shiftadd_cli.benchmark.timing import Clock, Span, Spread, Timed, interleave
from shiftadd_cli.benchmark.work import Work
from shiftadd_cli.runtime.opened import Loaded, ModelInfo, Opened
from shiftadd_cli.source.memory import trim


@dataclass(frozen=True)
class ModelSpeed:
    """One candidate.

    Attributes:
        name: its spec and dtype.
        load: times of loading the weights, with their files in the system's page cache.
        unit: unit of the work: `tokens` or `images`.
        work: times by name, see `text_work` and `image_work`.
        weight_bytes: bytes of all tensors of the loaded model, each counted once.
        resident_bytes: growth of the process when it loads the model; None if the system does not report it.
    """

    name: str
    info: ModelInfo
    load: Timed
    unit: str
    work: dict[str, Timed]
    weight_bytes: int
    resident_bytes: Spread | None

    def gains_over(self, other: ModelSpeed) -> dict[str, Spread]:
        """Ratios to `other` in each round; above 1 means faster, smaller or loaded sooner."""
        gains = {name: timed.rate.over(other.work[name].rate) for name, timed in self.work.items()}
        gains["load"] = other.load.seconds.over(self.load.seconds)
        gains["weights in memory"] = Spread((other.weight_bytes / self.weight_bytes,))
        gains["size on disk"] = Spread((other.info.file_bytes / self.info.file_bytes,))
        return gains

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **asdict(self.info),
            f"{self.unit}_per_second": {name: timed.rate.to_dict() for name, timed in self.work.items()},
            "load_seconds": self.load.seconds.to_dict(),
            "weight_bytes": self.weight_bytes,
            "resident_bytes": self.resident_bytes and self.resident_bytes.to_dict(),
            "times": {name: timed.to_dict() for name, timed in {"load": self.load, **self.work}.items()},
        }


class Candidate(NamedTuple):
    """A model to measure in one dtype; only its headers have been read."""

    name: str
    opened: Opened
    dtype: str


def measure_models(
    candidates: Sequence[Candidate],
    work: Sequence[Work],
    unit: str,
    touch: Callable[[Any], Any],
    *,
    rounds: int,
    clock: Clock | None = None,
    show_progress: bool = True,
) -> tuple[list[ModelSpeed], Loaded]:
    """Speeds of all candidates, which take turns in every round, and the first candidate, loaded.

    Every round loads every candidate again. After the last round, all are in memory and take turns at each piece of
    work. touch: runs a model on a tiny input, so that everything it needs is in memory. unit: see `ModelSpeed`.
    """
    clock = clock or Clock()
    loaders = {candidate.name: _Loader(candidate, touch, clock) for candidate in candidates}
    loads = interleave(loaders, rounds, desc="Loading" if show_progress else None)
    turns = {
        (name, index): partial(piece.run, loader.model, clock)
        for index, piece in enumerate(work)
        for name, loader in loaders.items()
    }
    runs = interleave(turns, rounds, desc="Running" if show_progress else None)
    speeds = []
    for name, loader in loaders.items():
        grown = [load.grown for load in loads[name] if load.grown is not None]
        timed = {
            part: Timed(tuple(spans[position] for spans in runs[name, index]), amount)
            for index, piece in enumerate(work)
            for position, (part, amount) in enumerate(piece.parts)
        }
        speeds.append(
            ModelSpeed(
                name=name,
                info=loader.loaded.info,
                load=Timed(tuple(load.span for load in loads[name])),
                unit=unit,
                work=timed,
                weight_bytes=weight_bytes(loader.model),
                resident_bytes=Spread(tuple(map(float, grown))) if grown else None,
            )
        )
    return speeds, loaders[candidates[0].name].loaded


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a model and its modules hold; shared tensors count once."""
    sizes = {}
    for module in model.modules():
        attributes = (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values())
        for tensor in attributes:
            if isinstance(tensor, Tensor):
                sizes[tensor.data_ptr(), tensor.device] = tensor.nbytes
    return sum(sizes.values())


class _Load(NamedTuple):
    span: Span
    grown: int | None


class _Loader:
    """Loads a candidate on every call, and drops the previously loaded model."""

    def __init__(self, candidate: Candidate, touch: Callable[[Any], Any], clock: Clock) -> None:
        self._candidate, self._touch, self._clock = candidate, touch, clock
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
        # Layers may do one-time setup on first use, and files may be mapped but not read yet.
        with torch.inference_mode():
            self._touch(self.model)
        after = _settled_memory()
        return _Load(span, None if before is None or after is None else after - before)


def _settled_memory() -> int | None:
    gc.collect()
    trim()
    return resident_memory()
