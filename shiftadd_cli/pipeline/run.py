"""Run a plan: block after block is read, calibrated, quantized and written, and nothing is held longer."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.artifact.writer import ArtifactWriter
from shiftadd_cli.bcq.solver import Solution, SolverOptions, quantize_matrices
from shiftadd_cli.calibration.hessian import SharedInput, gather_moments
from shiftadd_cli.calibration.text import TextData, load_text, sample_windows
from shiftadd_cli.calibration.trace import Trace, check_finite, trace_model
from shiftadd_cli.pipeline.account import Measured, make_report
from shiftadd_cli.pipeline.plan import Plan
from shiftadd_cli.report.schema import LayerReport, Report
from shiftadd_cli.source import LinearSpec

Blocks = Callable[[Sequence[str], str], Iterable[str]]


@dataclass(frozen=True)
class CalibrationSet:
    """The text and the windows drawn from it, int64 `[samples, seq_len]`."""

    text: TextData
    windows: Tensor


def load_calibration(plan: Plan) -> CalibrationSet | None:
    """Text and windows of the plan's recipe, None for a run without data. Raises CalibrationError, before any work."""
    if not plan.calibrated:
        return None
    recipe = plan.recipe
    text = load_text(recipe.calibration, split="calibration")
    tokenizer = plan.source.load_tokenizer()
    windows = sample_windows(text, tokenizer, samples=recipe.samples, seq_len=recipe.seq_len, seed=recipe.seed)
    return CalibrationSet(text, windows)


def run_plan(
    plan: Plan,
    calibration: CalibrationSet | None,
    out: Path,
    *,
    device: torch.device,
    overwrite: bool,
    command: Sequence[str],
    progress: Blocks,
) -> Report:
    """Do the work and put the artifact at `out`; returns what report.json says.

    progress: wraps the block names, with a description, to show how far the run is. Raises NumericalError naming a
    layer whose values cannot be quantized, OutputError when the disk refuses; nothing is left at `out` then.
    """
    with ArtifactWriter(out, overwrite=overwrite, shard_bytes=plan.recipe.shard_bytes) as writer:
        writer.plan(plan.tensors)
        return _Run(plan, calibration, writer, device, list(command)).execute(progress)


@dataclass
class _Run:
    plan: Plan
    calibration: CalibrationSet | None
    writer: ArtifactWriter
    device: torch.device
    command: list[str]
    clock: Measured = field(default_factory=Measured)
    layers: list[LayerReport] = field(default_factory=list)

    def execute(self, progress: Blocks) -> Report:
        plan = self.plan
        trace = self._start()
        for depth, name in enumerate(progress(plan.structure.blocks, "Quantizing")):
            self._block(depth, name, trace)
        with self.clock.phase("read_and_write"):
            plan.source.save_tokenizer(self.writer.folder)
            files_bytes = self.writer.nbytes
            report = make_report(
                plan,
                None if self.calibration is None else (self.calibration.text, self.calibration.windows),
                self.layers,
                files_bytes=files_bytes,
                clock=self.clock,
                device=self.device,
                command=self.command,
            )
            self.writer.finish(self._config(), report.model_dump(mode="json"))
        return report

    def _start(self) -> Trace | None:
        """Write what lies outside the blocks, and run the samples up to the first block."""
        source, structure = self.plan.source, self.plan.structure
        with self.clock.phase("read_and_write"):
            source.materialise(structure.outside)
            blocks = tuple(f"{name}." for name in structure.blocks)
            self._write_kept(name for name in self.plan.kept if not name.startswith(blocks))
        trace = None
        if self.calibration is not None:
            with self.clock.phase("trace"):
                model = source.skeleton()
                _move(model, structure.outside, self.device)
                windows = self.calibration.windows
                trace = trace_model(source, structure, windows, self.plan.recipe.batch_size, self.device)
        source.release(structure.outside)
        return trace

    def _block(self, depth: int, name: str, trace: Trace | None) -> None:
        source = self.plan.source
        with self.clock.phase("read_and_write"):
            source.materialise([name])
            block = source.skeleton().get_submodule(name)
            block.to(self.device)
            self._write_kept(kept for kept in self.plan.kept if kept.startswith(f"{name}."))
        specs = {each.spec.name: each.spec for each in self.plan.linears if each.spec.block == depth}
        with self.clock.phase("forward"):
            inputs = self._inputs(depth, block, list(specs), trace)
        with self.clock.phase("solve"):
            for shared in inputs:
                self._quantize(shared, specs)
        last = depth + 1 == len(self.plan.structure.blocks)
        if trace is not None and not last:
            with self.clock.phase("forward"):
                self._advance(depth, block, name, trace)
        source.release([name])

    def _inputs(self, depth: int, block: nn.Module, names: list[str], trace: Trace | None) -> list[SharedInput]:
        """The linears of a block by the input they read, with its second moment."""
        if trace is None:
            return [SharedInput((name,), None) for name in names]
        model = self.plan.source.skeleton()
        linears = [(name, model.get_submodule(name)) for name in names]
        return gather_moments(block, linears, trace.hidden, trace.calls, depth, self.device)

    def _quantize(self, shared: SharedInput, specs: dict[str, LinearSpec]) -> None:
        """Quantize linears that read one input, write them, and put the decoded weights in their place."""
        model = self.plan.source.skeleton()
        options = SolverOptions.from_recipe(self.plan.recipe)
        if shared.hessian is None:
            options = options.without_data()
        modules = [model.get_submodule(name) for name in shared.names]
        weights = [_matrix(module, specs[name]) for name, module in zip(shared.names, modules, strict=True)]
        solutions = quantize_matrices(weights, shared.names, shared.hessian, options)
        for name, module, solution in zip(shared.names, modules, solutions, strict=True):
            for suffix, tensor in solution.weight.tensors.items():
                self.writer.add(f"{name}.{suffix}", tensor)
            _replace(module, solution.weight.decode(), specs[name])
            self.layers.append(_layer_report(specs[name], solution, calibrated=shared.hessian is not None))

    def _advance(self, depth: int, block: nn.Module, name: str, trace: Trace) -> None:
        """Put the quantized block's outputs in the place of its inputs: the next block calibrates on what it sees."""
        with torch.no_grad():
            for index, batch in enumerate(trace.hidden):
                output = trace.calls[len(batch)][depth].run(block, batch.to(self.device))
                check_finite(output, name)
                trace.hidden.replace(index, output)

    def _write_kept(self, names: Iterable[str]) -> None:
        state = self.plan.source.skeleton().state_dict()
        for name in names:
            self.writer.add(name, state[name])

    def _config(self) -> dict[str, Any]:
        """config.json: the source's own, with its dtype, its class and our quantization_config."""
        source = self.plan.source
        config: dict[str, Any] = json.loads(source.config.to_json_string())
        config["architectures"] = [type(source.skeleton()).__name__]
        config["dtype"] = str(source.dtype).removeprefix("torch.")
        config["quantization_config"] = self.plan.artifact_format().to_dict()
        return config


def _matrix(module: nn.Module, spec: LinearSpec) -> Tensor:
    """The weight as `[out, in]`."""
    weight = module.get_parameter("weight").detach()
    return weight.T if spec.transposed else weight


def _replace(module: nn.Module, weight: Tensor, spec: LinearSpec) -> None:
    """Put `weight` `[out, in]` in the place of the module's own, in its layout and dtype."""
    parameter = module.get_parameter("weight")
    parameter.data = (weight.T.contiguous() if spec.transposed else weight).to(parameter.dtype)


def _move(model: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Move modules, or parameters and buffers that stand by themselves, to the device."""
    modules = dict(model.named_modules())
    for name in names:
        if name in modules:
            modules[name].to(device)
        else:
            tensor = operator.attrgetter(name)(model)
            tensor.data = tensor.data.to(device)


def _layer_report(spec: LinearSpec, solution: Solution, *, calibrated: bool) -> LayerReport:
    layout = solution.weight.layout
    return LayerReport(
        name=spec.name,
        kind=spec.kind,
        block=spec.block,
        out_features=spec.out_features,
        in_features=spec.in_features,
        bits=layout.bits,
        bits_per_weight=layout.bits_per_weight,
        weight_error=solution.weight_error,
        output_error=solution.output_error,
        calibrated=calibrated,
    )
