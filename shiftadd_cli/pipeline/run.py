"""Run a plan: read, calibrate, quantize and write one block after another, with only one block in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shiftadd_cli.artifact.workspace import Workspace
from shiftadd_cli.artifact.writer import ArtifactWriter
from shiftadd_cli.bcq.solver import Solution
from shiftadd_cli.blockwise.stored_states import StoredStates
from shiftadd_cli.device import dtype_name
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.pipeline.account import PhaseClock, make_report
from shiftadd_cli.pipeline.block import BlockQuantizer
from shiftadd_cli.pipeline.calibration import CalibrationSet
from shiftadd_cli.pipeline.final_check import check_checkpoint
from shiftadd_cli.pipeline.history import Asked, History
from shiftadd_cli.pipeline.plan import Plan
from shiftadd_cli.pipeline.walk import Walk
from shiftadd_cli.progress import BlockProgress
from shiftadd_cli.report.card import CARD_FILE, render_card
from shiftadd_cli.report.cost import model_cost
from shiftadd_cli.report.page import PAGE_FILE, Run, render_page
from shiftadd_cli.report.schema import (
    BlockReport,
    DistillationReport,
    LayerReport,
    Report,
    TableReport,
)
from shiftadd_cli.report.unit_costs import load_unit_costs
from shiftadd_cli.runtime.remote_code import code_entry, code_files
from shiftadd_cli.source import LinearSpec


def run_plan(
    plan: Plan,
    calibration: CalibrationSet | None,
    out: Path,
    *,
    device: torch.device,
    overwrite: bool,
    command: Sequence[str],
    progress: BlockProgress,
    clock: PhaseClock | None = None,
    history: History | None = None,
    team: Team = ALONE,
) -> Report:
    """Do the work and write the artifact to `out`; returns the content of report.json.

    progress: wraps the block names, with a description, to show progress. clock: accumulates the times of the run, and
    may already be running. history: the run continues where it ends; it must be begun, in an entered workspace. By
    default the run starts over. team: this process is its first; the others call `follow`.

    Raises NumericalError naming a layer whose values cannot be quantized, or OutputError if writing fails; nothing is
    written to `out` then.
    """
    samples = None if calibration is None else calibration.samples
    with ExitStack() as stack:
        if history is None:
            history = History(stack.enter_context(Workspace(out, resume=False)), plan.structure.blocks)
            history.begin(Asked.of(plan, samples))
        writer = stack.enter_context(
            ArtifactWriter(out, overwrite=overwrite, shard_bytes=plan.recipe.shard_bytes, workspace=history.workspace)
        )
        writer.plan(plan.tensors, history.written)
        walk = Walk(plan, samples, device, clock or PhaseClock(), team, history.workspace.folder, read=writer.read)
        return _Run(walk, calibration, writer, list(command), history).execute(progress)


@dataclass
class _Run:
    walk: Walk
    calibration: CalibrationSet | None
    writer: ArtifactWriter
    command: list[str]
    history: History
    layers: list[LayerReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    tables: list[TableReport] = field(default_factory=list)
    states: dict[str, StoredStates] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        return self.walk.plan

    @property
    def clock(self) -> PhaseClock:
        return self.walk.clock

    def execute(self, progress: BlockProgress) -> Report:
        plan, names, done = self.plan, self.plan.structure.blocks, self.history.done
        for block in self.history.blocks:
            self.layers += block.layers
            self.blocks += block.blocks
        # The remaining blocks need the samples, and so does distillation.
        running = self.walk.samples is not None and (done < len(names) or self._to_distill)
        self.walk.team.share([done, running])
        self._start(progress, running)
        text = f"Quantizing ({done} of {len(names)} blocks were done before)" if done else "Quantizing"
        for depth, name in enumerate(progress(names[done:], text), done):
            self._block(depth, name)
        distillation = self._distill(progress) if plan.recipe.distill_epochs else None
        with self.clock.phase("read_and_write"):
            plan.source.save_companions(self.writer.folder)
            files_bytes = self.writer.nbytes
            report = make_report(
                plan,
                None if self.calibration is None else self.calibration.report(),
                self.layers,
                self.blocks,
                distillation,
                self.tables,
                files_bytes=files_bytes,
                clock=self.clock,
                device=self.walk.device,
                processes=self.walk.team.size,
                command=self.command,
            )
            for name, text in checkpoint_pages(plan, report, self.writer.out.name).items():
                self.writer.add_file(name, text)
        with self.clock.phase("check"):
            sample, expected = self.walk.predict_stored(self.writer.read, progress)
        with self.clock.phase("read_and_write"):
            self.writer.finish(
                self._config(),
                report.model_dump(mode="json"),
                lambda folder: check_checkpoint(folder, sample, expected, remote_code=self.plan.source.remote_code),
            )
        return report

    @property
    def _to_distill(self) -> bool:
        return bool(self.plan.recipe.distill_epochs) and self.history.distilled is None

    def _start(self, progress: BlockProgress, running: bool) -> None:
        """Write the parts outside the blocks, and run the samples up to the first block if `running`.

        A resumed run already has everything except the arguments of the blocks.
        """
        history, walk, structure = self.history, self.walk, self.plan.structure
        begun = history.start is not None
        with self.clock.phase("read_and_write"):
            self.plan.running.materialise(structure.outside)
            blocks = tuple(f"{name}." for name in structure.blocks)
            if not begun:
                self._write_kept(name for name in self.plan.kept if not name.startswith(blocks))
            self.tables += walk.store_tables((lambda name, tensor: None) if begun else self.writer.add)
        if running:
            assert walk.samples is not None, "there are samples to run"
            history.drop_old_states()
            self.states = history.states(len(walk.samples), self.plan.recipe.batch_size)
            walk.trace_samples(self._place, self.states, progress)
            walk.weigh_tokens(history.token_weights(), progress)
        self.plan.running.release(structure.outside)
        if not begun:
            with self.clock.phase("read_and_write"):
                history.keep_start(self.writer, self.states, walk.token_weights, self.clock)

    def _place(self) -> StoredStates:
        samples = self.walk.samples
        assert samples is not None, "there are states to be kept"
        return StoredStates(self.history.workspace.states, len(samples), self.plan.recipe.batch_size)

    def _block(self, depth: int, name: str) -> None:
        quantizer, report = self.walk.quantize(depth, name)
        blocks = [] if report is None else [report]
        last = depth + 1 == len(self.plan.structure.blocks)
        if last:
            # Distillation tunes the whole model towards the final outputs of the original.
            needed = ["original"] if self.plan.recipe.distill_epochs else []
            self.states = {name: self.states[name] for name in needed}
        for states in self.states.values():
            states.turn()
        with self.clock.phase("read_and_write"):
            self._write_kept(path for path in self.plan.kept if path.startswith(f"{name}."))
            layers = self._write_solutions(quantizer)
        self.walk.model.release(depth)
        self.layers += layers
        self.blocks += blocks
        with self.clock.phase("read_and_write"):
            self.history.keep_block(name, layers, blocks, self.writer, self.states, self.clock)

    def _distill(self, progress: BlockProgress) -> DistillationReport:
        """Tune the whole model, or load the result of an earlier run, and overwrite the blocks' tensors with it."""
        history = self.history
        if self._to_distill:
            result = self.walk.distill(self.writer.read, progress)
            report = DistillationReport(
                divergence_before=result.divergence_before,
                divergence_after=result.divergence_after if isfinite(result.divergence_after) else None,
                kept=result.kept,
            )
            history.keep_distilled(report, result.tensors, self.clock)
        self.walk.team.share(False)
        distilled, tensors = history.distilled, history.distilled_tensors()
        assert distilled is not None, "it was kept"
        assert tensors is not None, "it was kept"
        with self.clock.phase("read_and_write"):
            self.writer.withdraw(tensors)
            for name, tensor in tensors.items():
                self.writer.add(name, tensor)
        return distilled.report

    def _write_solutions(self, quantizer: BlockQuantizer) -> list[LayerReport]:
        layers = []
        for kind, spec in quantizer.specs.items():
            solution = quantizer.solutions[kind]
            for suffix, tensor in solution.weight.tensors.items():
                self.writer.add(f"{spec.name}.{suffix}", tensor)
            layers.append(_layer_report(spec, solution, quantizer.tokens[kind] if self.plan.calibrated else None))
        return layers

    def _write_kept(self, names: Iterable[str]) -> None:
        state = self.plan.running.skeleton().state_dict()
        for name in names:
            tensor = state[name].to(self.plan.tensors[name][1])
            _check_kept(name, tensor)
            self.writer.add(name, tensor)

    def _config(self) -> dict[str, Any]:
        """The content of config.json: that of the source, with its dtype, its class, our quantization_config and code
        file."""
        source = self.plan.source
        config = source.config_fields() | code_entry(source.config)
        config["quantization_config"] = self.plan.artifact_format().to_dict()
        return config


def _check_kept(name: str, tensor: Tensor) -> None:
    """Raise NumericalError unless all numbers are finite."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise NumericalError(
            f"{name} holds values that are not finite in {dtype_name(tensor.dtype)}; "
            + ("give `dtype` bfloat16 or float32, or " if tensor.dtype == torch.float16 else "")
            + "fix the source."
        )


def _layer_report(spec: LinearSpec, solution: Solution, tokens: int | None) -> LayerReport:
    layout = solution.weight.layout
    return LayerReport(
        name=spec.name,
        kind=spec.kind,
        block=spec.block,
        out_features=spec.out_features,
        in_features=spec.in_features,
        primitive=layout.format.primitive,
        bits=layout.bits,
        bits_per_weight=layout.bits_per_weight,
        weight_error=solution.weight_error,
        output_error=solution.output_error,
        calibrated=solution.output_error is not None,
        tokens=tokens,
    )


def checkpoint_pages(plan: Plan, report: Report, name: str) -> dict[str, str]:
    """The text files, by name, of a checkpoint whose folder is called `name`."""
    layouts = {linear.spec.name: linear.layout for linear in plan.linears}
    cost = model_cost(plan.source.skeleton(), layouts, plan.tensors, load_unit_costs())
    run = Run(name, report, cost)
    return {PAGE_FILE: render_page([run]), CARD_FILE: render_card(run), **code_files(plan.source.config)}
