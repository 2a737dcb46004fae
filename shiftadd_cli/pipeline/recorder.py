"""What a run stores: the checkpoint, and the journal from which it can be resumed.

All processes of a team run the same code. The first has a `CheckpointRecorder`; the others have a `Recorder`, which
stores nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from shiftadd_cli.allocation.plan_file import BitPlan
from shiftadd_cli.artifact.workspace import Workspace
from shiftadd_cli.artifact.writer import ArtifactWriter
from shiftadd_cli.bcq.solver import Solution
from shiftadd_cli.blockwise.hidden_states import HiddenStates
from shiftadd_cli.blockwise.stored_states import StoredStates
from shiftadd_cli.context import Context
from shiftadd_cli.device import dtype_name
from shiftadd_cli.distillation.distill import Distillation
from shiftadd_cli.errors import Interrupted, NumericalError, OutputError, RecipeError, TeamError
from shiftadd_cli.pipeline.account import PhaseClock, make_report
from shiftadd_cli.pipeline.block import BlockQuantizer
from shiftadd_cli.pipeline.final_check import check_checkpoint
from shiftadd_cli.pipeline.history import History, RunInputs
from shiftadd_cli.pipeline.plan import Plan
from shiftadd_cli.report.card import CARD_FILE, render_card
from shiftadd_cli.report.cost import model_cost
from shiftadd_cli.report.page import PAGE_FILE, Run, render_page
from shiftadd_cli.report.schema import (
    BlockReport,
    CalibrationReport,
    DistillationReport,
    LayerReport,
    Report,
    TableReport,
)
from shiftadd_cli.report.unit_costs import load_unit_costs
from shiftadd_cli.runtime.remote_code import code_entry, code_files
from shiftadd_cli.signals import Terminated
from shiftadd_cli.source import LinearSpec

# The models whose hidden states a run keeps.
Followed = Literal["quantized", "original"]


class Recorder:
    """Stores nothing, and knows of no earlier run: for all processes of a team except the first.

    Attributes:
        bit_plan: the bits that an earlier run chose.
        done: number of blocks that an earlier run finished.
        tuned: whether an earlier run finished distillation.
        tables: reports of the tables that an earlier run stored; None if it did not get that far.
        spill: folder for data kept out of memory; None for the system's own.
    """

    bit_plan: BitPlan | None = None
    done: int = 0
    tuned: bool = False
    tables: list[TableReport] | None = None
    spill: Path | None = None

    def keep_bits(self, bit_plan: BitPlan) -> None:
        """Record the bits that were chosen."""

    def begin(self, plan: Plan) -> None:
        """Open the checkpoint of `plan`, whose bits are final. Call this before the methods below."""

    def add_outside(self) -> None:
        """Write the unquantized tensors outside the blocks, which must be loaded."""

    def add_table(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of a table."""

    def hidden_states(self, model: Followed, samples: int, batch_size: int) -> HiddenStates:
        """Storage for the hidden states of a model in this process: those at the input of the next block in a resumed
        run."""
        return HiddenStates(samples, batch_size, partial=True)

    def token_weights(self) -> dict[str, Tensor] | None:
        """The token weights of a resumed run, by name of the linear."""
        return None

    def keep_start(self, tables: list[TableReport], token_weights: dict[str, Tensor] | None) -> None:
        """Record that everything before the blocks is done."""

    def keep_block(self, name: str, quantizer: BlockQuantizer, report: BlockReport | None) -> None:
        """Write the tensors of a quantized block, which is still loaded, and record that it is done."""

    def read(self, name: str) -> Tensor:
        """A tensor of the checkpoint, as it was written. Only the first process has them."""
        raise RuntimeError(f"this process has not written {name}")

    def keep_distilled(self, result: Distillation | None) -> None:
        """Record the result of distillation, which only the first process has."""

    def finish(self, predict: Callable[[], tuple[Tensor, Tensor]]) -> Report | None:
        """Write the report and put the checkpoint in its place, after a check that it loads and predicts the same.

        predict: returns a sample, and the predictions for it by the stored tensors.

        Returns the report, in the first process. Raises NumericalError if the check fails; nothing is written then.
        """
        return None


class CheckpointRecorder(Recorder):
    """The recorder of the first process: continues the checkpoint and journal of `history`, in `context`.

    calibration: for the report. The writer is entered into `stack`.
    """

    def __init__(
        self,
        history: History,
        calibration: CalibrationReport | None,
        context: Context,
        clock: PhaseClock,
        stack: ExitStack,
        *,
        overwrite: bool,
        command: Sequence[str],
    ) -> None:
        self._history, self._calibration, self._context, self._clock = history, calibration, context, clock
        self._stack, self._overwrite, self._command = stack, overwrite, list(command)
        self._states: dict[str, StoredStates] = {}
        self._layers = [layer for block in history.blocks for layer in block.layers]
        self._blocks = [report for block in history.blocks for report in block.blocks]
        self.bit_plan, self.done = history.bit_plan, history.done
        self.tables = None if history.start is None else history.start.tables
        self.tuned, self.spill = history.distilled is not None, history.workspace.folder

    def keep_bits(self, bit_plan: BitPlan) -> None:
        self._history.keep_bits(bit_plan, self._clock)

    def begin(self, plan: Plan) -> None:
        self._plan, workspace = plan, self._history.workspace
        writer = ArtifactWriter(
            workspace.out, overwrite=self._overwrite, shard_bytes=plan.recipe.shard_bytes, workspace=workspace
        )
        self._writer = self._stack.enter_context(writer)
        self._writer.plan(plan.tensors, self._history.written)

    def add_outside(self) -> None:
        if self._history.start is None:
            blocks = tuple(f"{name}." for name in self._plan.structure.blocks)
            self._add_kept(name for name in self._plan.kept if not name.startswith(blocks))

    def add_table(self, name: str, tensor: Tensor) -> None:
        if self._history.start is None:
            self._writer.add(name, tensor)

    def hidden_states(self, model: Followed, samples: int, batch_size: int) -> HiddenStates:
        if not self._states:
            self._history.drop_old_states()
            self._states = self._history.states(samples, batch_size)
        if model not in self._states:
            self._states[model] = StoredStates(self._history.workspace.states, samples, batch_size, model)
        return self._states[model]

    def token_weights(self) -> dict[str, Tensor] | None:
        return self._history.token_weights()

    def keep_start(self, tables: list[TableReport], token_weights: dict[str, Tensor] | None) -> None:
        self.tables = tables
        if self._history.start is None:
            with self._clock.phase("read_and_write"):
                self._history.keep_start(self._writer, self._states, tables, token_weights, self._clock)

    def keep_block(self, name: str, quantizer: BlockQuantizer, report: BlockReport | None) -> None:
        if self._history.done + 1 == len(self._plan.structure.blocks):
            # Distillation tunes the whole model towards the final outputs of the original.
            needed = ["original"] if self._plan.recipe.distill_epochs else []
            self._states = {name: self._states[name] for name in needed}
        for states in self._states.values():
            states.turn()
        with self._clock.phase("read_and_write"):
            self._add_kept(path for path in self._plan.kept if path.startswith(f"{name}."))
            layers, blocks = self._add_solutions(quantizer), [] if report is None else [report]
            self._history.keep_block(name, layers, blocks, self._writer, self._states, self._clock)
        self._layers += layers
        self._blocks += blocks

    def read(self, name: str) -> Tensor:
        return self._writer.read(name)

    def keep_distilled(self, result: Distillation | None) -> None:
        assert result is not None, "this process tuned the model"
        report = DistillationReport(
            divergence_before=result.divergence_before,
            divergence_after=result.divergence_after if isfinite(result.divergence_after) else None,
            kept=result.kept,
        )
        self._history.keep_distilled(report, result.tensors, self._clock)

    def finish(self, predict: Callable[[], tuple[Tensor, Tensor]]) -> Report:
        plan, writer = self._plan, self._writer
        with self._clock.phase("read_and_write"):
            distillation = self._add_distilled()
            plan.source.save_companions(writer.folder)
            files_bytes = writer.nbytes
        with self._clock.phase("check"):
            sample, expected = predict()
        with self._clock.phase("read_and_write"):
            report = make_report(
                plan,
                self._calibration,
                self._layers,
                self._blocks,
                distillation,
                self.tables or [],
                files_bytes=files_bytes,
                clock=self._clock,
                context=self._context,
                command=self._command,
            )
            for name, text in checkpoint_pages(plan, report, writer.out.name).items():
                writer.add_file(name, text)
            # The configuration of the source, with its dtype, its class, and ours.
            config = plan.source.config_fields() | code_entry(plan.source.config)
            config["quantization_config"] = plan.artifact_format().to_dict()
            remote_code = plan.source.remote_code
            writer.finish(
                config,
                report.model_dump(mode="json"),
                lambda folder: check_checkpoint(folder, sample, expected, remote_code=remote_code),
            )
        return report

    def _add_distilled(self) -> DistillationReport | None:
        """Overwrite tensors of the blocks by the tuned ones."""
        distilled, tensors = self._history.distilled, self._history.distilled_tensors()
        if distilled is None or tensors is None:
            return None
        self._writer.withdraw(tensors)
        for name, tensor in tensors.items():
            self._writer.add(name, tensor)
        return distilled.report

    def _add_solutions(self, quantizer: BlockQuantizer) -> list[LayerReport]:
        layers = []
        for kind, spec in quantizer.specs.items():
            solution = quantizer.solutions[kind]
            for suffix, tensor in solution.weight.tensors.items():
                self._writer.add(f"{spec.name}.{suffix}", tensor)
            layers.append(_layer_report(spec, solution, quantizer.tokens[kind] if self._plan.calibrated else None))
        return layers

    def _add_kept(self, names: Iterable[str]) -> None:
        state = self._plan.running.skeleton().state_dict()
        for name in names:
            tensor = state[name].to(self._plan.tensors[name][1])
            _check_kept(name, tensor)
            self._writer.add(name, tensor)


@contextmanager
def recording(
    out: Path,
    blocks: tuple[str, ...],
    inputs: RunInputs,
    calibration: CalibrationReport | None,
    context: Context,
    clock: PhaseClock,
    *,
    resume: bool,
    overwrite: bool,
    command: Sequence[str],
) -> Iterator[Recorder]:
    """The recorder of this process, for a run over `blocks` into the folder `out`; see `Job.run`.

    Raises RecipeError if `inputs` differ from those of the first process, ResumeError if they differ from those of the
    unfinished run. An interruption or failure within the context is raised again with how to resume.
    """
    team = context.team
    if not team.first:
        _refuse_difference(inputs, RunInputs.model_validate(team.share({})))
        yield Recorder()
        return
    with Workspace(out, resume=resume) as workspace, ExitStack() as stack:
        history = History(workspace, blocks)
        history.begin(inputs)
        team.share(inputs.model_dump(mode="json"))
        if history.spent is not None:
            clock.go_on_from(history.spent)
        try:
            yield CheckpointRecorder(history, calibration, context, clock, stack, overwrite=overwrite, command=command)
        except KeyboardInterrupt as stop:
            # torchrun terminates the other processes as soon as one has failed.
            reason = team.fault() if isinstance(stop, Terminated) else None
            if reason is not None:
                raise TeamError(f"{reason} {history.how_to_go_on()}") from stop
            code = 143 if isinstance(stop, Terminated) else 130
            raise Interrupted(f"Interrupted. {history.how_to_go_on()}", code) from stop
        except (OutputError, TeamError) as failure:
            raise type(failure)(f"{failure} {history.how_to_go_on()}") from failure


def checkpoint_pages(plan: Plan, report: Report, name: str) -> dict[str, str]:
    """The text files, by name, of a checkpoint whose folder is called `name`."""
    cost = model_cost(plan.source.skeleton(), plan.artifact_format(), plan.tensors, load_unit_costs())
    run = Run(name, report, cost)
    return {PAGE_FILE: render_page([run]), CARD_FILE: render_card(run), **code_files(plan.source.config)}


def _refuse_difference(own: RunInputs, first: RunInputs) -> None:
    field = own.other_field(first)
    if difference := own.difference(first) if field is None else f"another {field}":
        raise RecipeError(f"The first process of the team has {difference}; give the same to all.")


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
