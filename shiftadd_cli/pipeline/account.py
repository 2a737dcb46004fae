"""Times and sizes of a run, and the report made of them."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from torch import Tensor

from shiftadd_cli.calibration.images import ImageData
from shiftadd_cli.calibration.text import TextData
from shiftadd_cli.pipeline.plan import Plan, resident_bytes
from shiftadd_cli.report.schema import (
    BitPlanReport,
    BlockReport,
    CalibrationReport,
    KeptReport,
    LayerReport,
    MachineReport,
    Report,
    SizeReport,
    SourceReport,
    TableReport,
    TimeReport,
    average_kinds,
)
from shiftadd_cli.version import __version__


class Measured:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds = dict.fromkeys(("allocate", "trace", "forward", "solve", "reconstruct", "read_and_write"), 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - start

    def report(self) -> TimeReport:
        rounded = {name: round(value, 3) for name, value in self.seconds.items()}
        return TimeReport(total=round(time.monotonic() - self.started, 3), **rounded)


def make_report(
    plan: Plan,
    calibration: tuple[TextData | ImageData, Tensor] | None,
    layers: list[LayerReport],
    blocks: list[BlockReport],
    tables: list[TableReport],
    *,
    files_bytes: int,
    clock: Measured,
    device: torch.device,
    command: list[str],
) -> Report:
    """Everything report.json says, but the checksums of the files."""
    source = plan.source
    order = {each.spec.name: place for place, each in enumerate(plan.linears)}
    layers = sorted(layers, key=lambda layer: order[layer.name])
    return Report(
        command=command,
        source=SourceReport(
            spec=source.spec,
            name=source.name,
            architecture=type(source.skeleton()).__name__,
            fingerprint=source.fingerprint,
            dtype=str(source.dtype).removeprefix("torch."),
            parameters=plan.parameters,
            file_bytes=source.file_bytes,
            model_bytes=source.model_bytes,
        ),
        recipe=plan.recipe.model_dump(mode="json"),
        recipe_fingerprint=plan.recipe.fingerprint(),
        calibration=None if calibration is None else _calibration(*calibration),
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
        tables=tables,
        kept=[KeptReport(name=name, reason=reason) for name, reason in plan.kept_modules],
        seconds=clock.report(),
        machine=MachineReport(
            device=str(device),
            threads=torch.get_num_threads(),
            peak_memory_bytes=resident_bytes(),
            expected_memory_bytes=plan.peak_memory_bytes,
            versions={
                "shiftadd-cli": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "safetensors")},
            },
        ),
    )


def _bit_plan(plan: Plan) -> BitPlanReport | None:
    if plan.bit_plan is None:
        return None
    return BitPlanReport(
        fingerprint=plan.bit_plan.fingerprint(),
        sensitivity=plan.bit_plan.made_by.sensitivity,
        predicted_loss=plan.bit_plan.predicted_loss,
    )


def _calibration(data: TextData | ImageData, samples: Tensor) -> CalibrationReport:
    images = isinstance(data, ImageData)
    return CalibrationReport(
        name=data.name,
        fingerprint=data.fingerprint,
        samples=len(samples),
        seq_len=None if images else samples.shape[1],
        tokens=None if images else samples.numel(),
        image_shape=tuple(samples.shape[1:]) if images else None,
    )
