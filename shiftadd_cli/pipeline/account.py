"""Times and sizes of a run, and its report."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from shiftadd_cli.allocation.front import lower_bound, uniform_points
from shiftadd_cli.context import Context
from shiftadd_cli.device import dtype_name
from shiftadd_cli.pipeline.memory import resident_bytes
from shiftadd_cli.pipeline.plan import Plan
from shiftadd_cli.report.schema import (
    BitPlanReport,
    BlockReport,
    CalibrationReport,
    DistillationReport,
    KeptReport,
    LayerReport,
    LeftBehindReport,
    MachineReport,
    Report,
    SizeReport,
    SourceReport,
    TableReport,
    TimeReport,
    TradeOffPoint,
    UniformPoint,
    average_kinds,
)
from shiftadd_cli.source.card import source_license
from shiftadd_cli.source.locate import hub_id
from shiftadd_cli.version import __version__

_PHASES = ("calibration", "allocate", "trace", "forward", "solve", "reconstruct", "distill", "check", "read_and_write")

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Spent(BaseModel):
    """Resources that a run has used so far: seconds by phase and in total, and peak memory in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    seconds: dict[str, Seconds]
    total: Seconds
    peak_memory_bytes: Annotated[int, Field(ge=0)]


class PhaseClock:
    """Wall-clock seconds by phase. A resumed run adds its own to those of the steps finished earlier."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds = dict.fromkeys(_PHASES, 0.0)
        self._before = Spent(seconds={}, total=0.0, peak_memory_bytes=0)

    def go_on_from(self, before: Spent) -> None:
        """Add the resources that an earlier run used for the steps that this one skips."""
        for name, value in before.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        self._before = before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside the context to a phase."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - start

    def spent(self) -> Spent:
        """Resources used up to now."""
        return Spent(
            seconds=dict(self.seconds),
            total=self._before.total + time.monotonic() - self.started,
            peak_memory_bytes=max(resident_bytes(), self._before.peak_memory_bytes),
        )

    def report(self) -> TimeReport:
        spent = self.spent()
        rounded = {name: round(value, 3) for name, value in spent.seconds.items()}
        return TimeReport(total=round(spent.total, 3), **rounded)


def versions() -> dict[str, str]:
    """Versions of shiftadd, Python, and the libraries that the results depend on."""
    return {
        "shiftadd-cli": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors")},
    }


def make_report(
    plan: Plan,
    calibration: CalibrationReport | None,
    layers: list[LayerReport],
    blocks: list[BlockReport],
    distillation: DistillationReport | None,
    tables: list[TableReport],
    *,
    files_bytes: int,
    clock: PhaseClock,
    context: Context,
    command: list[str],
) -> Report:
    """The content of report.json, except for the checksums of the files."""
    source = plan.source
    order = {linear.spec.name: index for index, linear in enumerate(plan.linears)}
    layers = sorted(layers, key=lambda layer: order[layer.name])
    return Report(
        command=command,
        source=SourceReport(
            spec=source.spec,
            name=source.name,
            architecture=type(source.skeleton()).__name__,
            fingerprint=source.fingerprint,
            dtype=dtype_name(source.dtype),
            parameters=plan.parameters,
            file_bytes=source.file_bytes,
            model_bytes=source.model_bytes,
            hub_id=hub_id(source.spec),
            license=source_license(source.path),
            reads_images=source.reads_images,
            left_behind=[LeftBehindReport(**asdict(left)) for left in source.left_behind],
        ),
        recipe=plan.recipe.model_dump(mode="json"),
        recipe_fingerprint=plan.recipe.fingerprint(),
        calibration=calibration,
        bit_plan=_bit_plan(plan),
        size=SizeReport(
            files_bytes=files_bytes,
            quantized_bytes=plan.quantized_bytes,
            table_bytes=plan.table_bytes,
            kept_bytes=plan.kept_bytes,
            quantized_weights=plan.quantized_weights,
            bits_per_weight=plan.bits_per_weight,
            planes_per_weight=plan.planes_per_weight,
            whole_file_bits_per_weight=8 * files_bytes / plan.parameters,
        ),
        kinds=average_kinds(layers),
        layers=layers,
        blocks=blocks,
        distillation=distillation,
        tables=tables,
        kept=[KeptReport(name=name, reason=reason) for name, reason in plan.kept_modules],
        seconds=clock.report(),
        machine=MachineReport(
            device=str(context.device),
            dtype=dtype_name(plan.running.dtype),
            processes=context.team.size,
            threads=torch.get_num_threads(),
            peak_memory_bytes=clock.spent().peak_memory_bytes,
            expected_memory_bytes=plan.peak_memory_bytes,
            versions=versions(),
        ),
    )


def _bit_plan(plan: Plan) -> BitPlanReport | None:
    if plan.bit_plan is None:
        return None
    bit_plan = plan.bit_plan
    bits_per_byte = 8 / bit_plan.weights
    return BitPlanReport(
        fingerprint=bit_plan.fingerprint(),
        sensitivity=bit_plan.made_by.sensitivity,
        predicted_loss=bit_plan.predicted_loss,
        uniform=[
            UniformPoint(bits=bits, bits_per_weight=point.nbytes * bits_per_byte, predicted_loss=point.predicted_loss)
            for bits, point in uniform_points(bit_plan).items()
        ],
        bound=[
            TradeOffPoint(bits_per_weight=point.nbytes * bits_per_byte, predicted_loss=point.predicted_loss)
            for point in lower_bound(bit_plan)
        ],
    )
