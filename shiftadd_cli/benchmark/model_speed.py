"""Whole models: how fast they load and work, and the memory their weights take."""

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
        load: of the weights, with their files in the system's page cache.
        unit: what amounts of work are of: `tokens` or `images`.
        work: by name, see `text_work` and `image_work`.
        weight_bytes: all tensors of the loaded model, each once.
        resident_bytes: by which the process grew on loading it; None where the system does not say.
    """

    name: str
    info: ModelInfo
    load: Timed
    unit: str
    work: dict[str, Timed]
    weight_bytes: int
    resident_bytes: Spread | None

    def gains_over(self, other: ModelSpeed) -> dict[str, Spread]:
        """How many times as good as `other` it is in each round, above 1 for faster, smaller and sooner loaded."""
        gains = {name: each.rate.over(other.work[name].rate) for name, each in self.work.items()}
        gains["load"] = other.load.seconds.over(self.load.seconds)
        gains["weights in memory"] = Spread((other.weight_bytes / self.weight_bytes,))
        gains["size on disk"] = Spread((other.info.file_bytes / self.info.file_bytes,))
        return gains

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **asdict(self.info),
            f"{self.unit}_per_second": {name: each.rate.to_dict() for name, each in self.work.items()},
            "load_seconds": self.load.seconds.to_dict(),
            "weight_bytes": self.weight_bytes,
            "resident_bytes": self.resident_bytes and self.resident_bytes.to_dict(),
            "times": {name: each.to_dict() for name, each in {"load": self.load, **self.work}.items()},
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
    """Speeds of all candidates, which take turns in every round, and the first of them loaded.

    Each candidate is loaded anew in every round. After the last, all are in memory and take turns at each piece of
    work. touch: runs a model on little, after which all that it needs is in memory. unit: see `ModelSpeed`.
    """
    clock = clock or Clock()
    loaders = {each.name: _Loader(each, touch, clock) for each in candidates}
    loads = interleave(loaders, rounds, desc="Loading" if show_progress else None)
    turns = {
        (name, index): partial(each.run, loader.model, clock)
        for index, each in enumerate(work)
        for name, loader in loaders.items()
    }
    runs = interleave(turns, rounds, desc="Running" if show_progress else None)
    speeds = []
    for name, loader in loaders.items():
        grown = [each.grown for each in loads[name] if each.grown is not None]
        timed = {
            part: Timed(tuple(spans[place] for spans in runs[name, index]), amount)
            for index, each in enumerate(work)
            for place, (part, amount) in enumerate(each.parts)
        }
        speeds.append(
            ModelSpeed(
                name=name,
                info=loader.loaded.info,
                load=Timed(tuple(each.span for each in loads[name])),
                unit=unit,
                work=timed,
                weight_bytes=weight_bytes(loader.model),
                resident_bytes=Spread(tuple(map(float, grown))) if grown else None,
            )
        )
    return speeds, loaders[candidates[0].name].loaded


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a model and its modules hold, those in several places once."""
    sizes = {}
    for module in model.modules():
        held = (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values())
        for tensor in held:
            if isinstance(tensor, Tensor):
                sizes[tensor.data_ptr(), tensor.device] = tensor.nbytes
    return sum(sizes.values())


class _Load(NamedTuple):
    span: Span
    grown: int | None


class _Loader:
    """Loads a candidate each time it is called, in the place of what it loaded before."""

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
        # A layer may set something up when it is first used, and files may be mapped and not read yet.
        with torch.inference_mode():
            self._touch(self.model)
        after = _settled_memory()
        return _Load(span, None if before is None or after is None else after - before)


def _settled_memory() -> int | None:
    gc.collect()
    trim()
    return resident_memory()
