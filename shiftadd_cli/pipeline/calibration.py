"""The calibration data of a run: checked before any work, and drawn or written by the model when the work starts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shiftadd_cli.data.images import draw_images, image_reader, load_images
from shiftadd_cli.data.mixture import KINDS, Part, parts_with_windows
from shiftadd_cli.data.text import check_tokens, load_text, sample_windows
from shiftadd_cli.device import choose_device
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.errors import RecipeError
from shiftadd_cli.pipeline.plan import Plan
from shiftadd_cli.report.schema import CalibrationPart, CalibrationReport
from shiftadd_cli.self_text.write import Request, WritingTokens, write_windows, writing_request


@dataclass(frozen=True)
class CalibrationSet:
    """The calibration samples, and their origin.

    Attributes:
        name: of the data, for reports; fingerprint: its SHA-256, hex.
        samples: windows of tokens, int64 `[samples, seq_len]`, or pixels, float32 `[samples, channels, height, width]`.
        window_start: see `Plan.window_start`.
        parts: of a mixture of texts; empty for one text, and for images.
    """

    name: str
    fingerprint: str
    samples: Tensor
    window_start: str | None
    parts: tuple[CalibrationPart, ...] = ()

    def report(self) -> CalibrationReport:
        """The calibration entry of report.json."""
        images = self.samples.ndim == 4
        return CalibrationReport(
            name=self.name,
            fingerprint=self.fingerprint,
            samples=len(self.samples),
            seq_len=None if images else self.samples.shape[1],
            tokens=None if images else self.samples.numel(),
            window_start=self.window_start,
            image_shape=tuple(self.samples.shape[1:]) if images else None,
            parts=list(self.parts),
        )


def samples_fingerprint(samples: Tensor) -> str:
    """SHA-256, in hex, of calibration samples: tokens or pixels, their dtype and shape."""
    digest = hashlib.sha256(f"{samples.dtype} {tuple(samples.shape)}".encode())
    digest.update(samples.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Drawn:
    """The windows of one part, and the name and fingerprint of their text."""

    name: str
    fingerprint: str
    windows: Tensor


@dataclass
class Calibration:
    """The data that a plan needs, created by `of`. Everything except text written by the model has been read."""

    plan: Plan
    _ready: CalibrationSet | None = None
    _parts: list[tuple[Part, _Drawn | Request]] = field(default_factory=list)
    _writing: WritingTokens | None = None

    @classmethod
    def of(cls, plan: Plan) -> Calibration | None:
        """Read the data of the plan's recipe; None for a run without data.

        Raises:
            CalibrationError: the data is missing, too short, or of the wrong kind.
        """
        if not plan.calibrated:
            return None
        recipe = plan.recipe
        if plan.source.reads_images:
            images = load_images(recipe.calibration, split="calibration", config=plan.source.config)
            drawn = draw_images(images, image_reader(plan.source), samples=recipe.samples, seed=recipe.seed)
            return cls(plan, CalibrationSet(images.name, images.fingerprint, drawn.inputs, None))
        parts = parts_with_windows(recipe.calibration, recipe.samples)
        writing = WritingTokens.of(plan.source) if any(part.spec in KINDS for part, _ in parts) else None
        sources: list[tuple[Part, _Drawn | Request]] = []
        for part, count in parts:
            if writing is not None and part.spec in KINDS:
                request = writing_request(recipe, part.spec, count)
                writing.kinds(request, plan.source.spec)
                sources.append((part, request))
            else:
                sources.append((part, _read(plan, part.spec, count)))
        return cls(plan, None, sources, writing)

    def draw(self, team: Team = ALONE) -> CalibrationSet:
        """The samples. The model writes its own text on the first call, if the recipe asks for it.

        team: its first process runs the model, and sends the text to the others.

        Raises:
            CalibrationError, NumericalError: the model cannot write, see `write_windows`.
            RecipeError: the first process has a different calibration.
        """
        if self._ready is None:
            self._ready = self._mixed(self._write_missing(team))
        return self._ready

    def _write_missing(self, team: Team) -> list[tuple[Part, _Drawn]]:
        running, writing, mine = self.plan.running, self._writing, {}
        if team.first and writing is not None:
            device = choose_device(self.plan.recipe.device)
            for part, origin in self._parts:
                if isinstance(origin, Request):
                    mine[part.spec] = write_windows(running, writing, origin, device)
        # Shared even if nothing was written: processes with other recipes are detected only after this exchange.
        written = team.share_tensors(mine)
        drawn = []
        for part, origin in self._parts:
            if isinstance(origin, Request):
                assert writing is not None, "the model was asked to write"
                windows = written.get(part.spec)
                if windows is None:
                    raise RecipeError("The first process of the team has another calibration; give the same to all.")
                name = _self_name(writing.kinds(origin, running.spec), origin, part.spec)
                drawn.append((part, _Drawn(name, samples_fingerprint(windows), windows)))
            else:
                drawn.append((part, origin))
        return drawn

    def _mixed(self, drawn: list[tuple[Part, _Drawn]]) -> CalibrationSet:
        start = self.plan.window_start
        if len(drawn) == 1:
            only = drawn[0][1]
            return CalibrationSet(only.name, only.fingerprint, only.windows, start)
        parts = tuple(
            CalibrationPart(name=data.name, fingerprint=data.fingerprint, share=part.share, samples=len(data.windows))
            for part, data in drawn
        )
        windows = torch.cat([data.windows for _, data in drawn])
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(self.plan.recipe.seed))
        mixed = windows[order]
        name = " + ".join(f"{part.share:.3g} {data.name}" for part, data in drawn)
        return CalibrationSet(name, samples_fingerprint(mixed), mixed, start, parts)


def draw_calibration(plan: Plan) -> CalibrationSet | None:
    """The data of a plan in one step; None for a run without data. Raises like `Calibration`."""
    calibration = Calibration.of(plan)
    return None if calibration is None else calibration.draw()


def _read(plan: Plan, spec: str, samples: int) -> _Drawn:
    recipe, source = plan.recipe, plan.source
    tokenizer: Any = source.load_tokenizer()
    text = load_text(spec, split="calibration", tokenizer=tokenizer)
    windows = sample_windows(text, tokenizer, samples=samples, seq_len=recipe.seq_len, seed=recipe.seed)
    rows: int = source.config.get_text_config().vocab_size
    check_tokens(windows, tokenizer, rows, data=text.name, model=source.spec)
    return _Drawn(text.name, text.fingerprint, windows)


def _self_name(kinds: Sequence[str], request: Request, spec: str) -> str:
    return (
        f"{spec} ({' and '.join(kinds)} that the model wrote, {request.piece_length} tokens at a stretch, temperature "
        f"{request.temperature:g}, min-p {request.min_p:g}, seed {request.seed})"
    )
