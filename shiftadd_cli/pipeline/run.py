"""The work of a run, block after block: loaded, quantized on the samples that reach it, stored and released.

Every process of a team runs this code. The first has all hidden states, the others those of the batches that they run;
only the first one's recorder stores anything.
"""

from __future__ import annotations

import copy
import operator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shiftadd_cli.bcq.weight import QuantizedWeight
from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.input_cache import InputCache
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.output_cache import OutputCache
from shiftadd_cli.blockwise.passage import Passage
from shiftadd_cli.blockwise.tensor_file import TensorFile
from shiftadd_cli.blockwise.trace import Trace, trace_model
from shiftadd_cli.calibration.gradients import squared_gradients
from shiftadd_cli.calibration.table_inputs import table_moment
from shiftadd_cli.context import Context
from shiftadd_cli.pipeline.account import PhaseClock
from shiftadd_cli.pipeline.block import BlockQuantizer
from shiftadd_cli.pipeline.plan import Plan
from shiftadd_cli.pipeline.recorder import Followed, Recorder
from shiftadd_cli.pipeline.stored_model import StoredModel
from shiftadd_cli.pipeline.tables import PlannedTable, by_suffix, encode_weight, place_weight, table_report
from shiftadd_cli.report.schema import BlockReport, Report, TableReport


@dataclass
class Run:
    """A run of `plan`, whose bits are final, with `samples` (None for a run without data).

    Attributes:
        trace: of the quantized model.
        original: of the original model, if the recipe follows it.
    """

    plan: Plan
    samples: Tensor | None
    context: Context
    recorder: Recorder
    clock: PhaseClock
    trace: Trace | None = None
    original: Trace | None = None
    token_weights: dict[str, Tensor] | None = None

    @property
    def model(self) -> BlockwiseModel:
        """The model in the compute dtype."""
        return BlockwiseModel(self.plan.running, self.plan.structure, self.context)

    def execute(self) -> Report | None:
        """Do the work; the first process returns the report.

        Raises NumericalError naming a layer whose values cannot be quantized, or OutputError if writing fails; no
        checkpoint is written then.
        """
        recorder, team, names = self.recorder, self.context.team, self.plan.structure.blocks
        recorder.begin(self.plan)
        done = team.share(recorder.done)
        tuned = team.share(recorder.tuned or not self.plan.recipe.distill_epochs)
        self._start(finished=done == len(names) and tuned)
        text = f"Quantizing ({done} of {len(names)} blocks were done before)" if done else "Quantizing"
        for depth, name in enumerate(self.context.progress(names[done:], text), done):
            quantizer, report = self.quantize_block(depth, name)
            recorder.keep_block(name, quantizer, report)
            self.model.release(depth)
        if not tuned:
            self._distill()
        sample = None if self.samples is None else self.samples[:1]
        passage = None if self.trace is None else self.trace.passage
        return recorder.finish(lambda: StoredModel(self.plan, self.model, recorder.read).predict(sample, passage))

    def _start(self, *, finished: bool) -> None:
        """Store the parts outside the blocks, and run the samples up to the first block unless the blocks are
        `finished`.

        The original runs with its own embeddings. Then these take their stored values, so that the first block
        calibrates on what they give.
        """
        samples = None if finished else self.samples
        with ExitStack() as stack:
            with self.clock.phase("read_and_write"):
                stack.enter_context(self.model.outside())
                self.recorder.add_outside()
            if samples is not None and self.plan.recipe.follows_original:
                with self.clock.phase("trace"):
                    self.original = self._trace("original", samples)
            passage = None if self.original is None else self.original.passage
            tables = self._tables(passage)
            if samples is not None:
                with self.clock.phase("trace"):
                    self.trace = self._trace("quantized", samples, passage)
                    if self.plan.recipe.loss_aware:
                        self.token_weights = self._token_weights(samples, self.trace)
        self.recorder.keep_start(tables, self.token_weights)

    def _tables(self, passage: Passage | None) -> list[TableReport]:
        """Store the tables, or read those of an earlier run, and give the model their values.

        passage: of the original, if known.
        """
        recorder, team, skeleton = self.recorder, self.context.team, self.model.skeleton
        if team.share(recorder.tables is not None):
            for table in self.plan.tables:
                stored = {name: recorder.read(name) for name in table.tensors()} if team.first else None
                place_weight(table, skeleton, by_suffix(table.name, team.share_tensors(stored)))
            return recorder.tables or []
        # All moments are of the original, whose weights are replaced afterwards.
        with self.clock.phase("forward"):
            moments = [self._table_moment(table, passage) for table in self.plan.tables]
        reports = []
        for table, moment in zip(self.plan.tables, moments, strict=True):
            with self.clock.phase("solve"):
                tensors, error = encode_weight(table, table.weight(skeleton), self.plan.recipe, moment, self.context)
                for suffix, tensor in tensors.items():
                    recorder.add_table(f"{table.name}.{suffix}", tensor)
                reports.append(table_report(table, place_weight(table, skeleton, tensors), error))
        return reports

    def _table_moment(self, table: PlannedTable, passage: Passage | None) -> Tensor | None:
        if self.samples is None or table.reader is None or table.layout.packed is None:
            return None
        return table_moment(self.model, self.samples, self.plan.recipe.batch_size, table.reader, passage)

    def _trace(self, model: Followed, samples: Tensor, passage: Passage | None = None) -> Trace:
        recipe, team = self.plan.recipe, self.context.team
        hidden = self.recorder.hidden_states(model, len(samples), recipe.batch_size)
        # The first process needs all batches, because it does the sequential steps, such as distillation, alone.
        own = None if team.first else team.shards(len(hidden)).own()
        trace = trace_model(
            self.model,
            samples,
            recipe.batch_size,
            hidden,
            passage=passage,
            batches=own,
            spill=self.recorder.spill,
        )
        trace.hidden.hand_out(team)
        return trace

    def _token_weights(self, samples: Tensor, trace: Trace) -> dict[str, Tensor]:
        """Squared gradients to the power of the recipe, normalized to mean 1; those of a resumed run, if any."""
        team, known = self.context.team, self.recorder.token_weights()
        if team.share(known is not None):
            return team.share_tensors(known)
        gradients = squared_gradients(self.model, samples, trace, seed=self.plan.recipe.seed)
        powers = {name: square**self.plan.recipe.loss_aware for name, square in gradients.token_weights().items()}
        return {name: power / power.mean() for name, power in powers.items()}

    def quantize_block(self, depth: int, name: str) -> tuple[BlockQuantizer, BlockReport | None]:
        """Load and quantize a block, and run the samples through it; the caller releases it."""
        recipe, trace = self.plan.recipe, self.trace
        with self.clock.phase("read_and_write"):
            block = self.model.load(depth)
        quantizer = self._quantizer(depth, block)
        if trace is None:
            quantizer.without_data()
            return quantizer, None
        report = None
        with TensorFile(self.recorder.spill) as waiting:
            stream, original = self._streams(trace, depth, quantizer, waiting)
            self._take_shared(depth)
            if original is None or not recipe.compares_inputs:
                quantizer.on(stream)
            else:
                quantizer.on(stream, InputCache(original, waiting))
            with self.clock.phase("forward"):
                if original is not None and not recipe.compares_inputs:
                    original.advance()
            if original is not None and recipe.reconstruct_epochs and quantizer.specs:
                report = quantizer.reconstruct(stream, original)
                stream = replace(stream, playback=None)
            if self._round_kept(name):
                stream = replace(stream, playback=None)
            if depth + 1 < len(self.model.names):
                with self.clock.phase("forward"):
                    # The next block calibrates on the outputs of the quantized block.
                    stream.advance()
        return quantizer, report

    def _quantizer(self, depth: int, block: nn.Module) -> BlockQuantizer:
        linears = [linear for linear in self.plan.linears if linear.spec.block == depth]
        prefix = f"{self.model.names[depth]}."
        return BlockQuantizer(
            block,
            [linear.spec for linear in linears],
            self.plan.recipe,
            self.clock,
            self.token_weights,
            {linear.spec.name: linear.layout.format.choice for linear in linears},
            self.context.team,
            {path.removeprefix(prefix) for path in self.plan.structure.shared_in(depth)},
        )

    def _streams(
        self, trace: Trace, depth: int, quantizer: BlockQuantizer, waiting: TensorFile
    ) -> tuple[BlockStream, BlockStream | None]:
        """The block to quantize with the states that reach it, and the same of the original, if the recipe needs it.
        waiting: for outputs of parts of the block."""
        name, block, calls = self.model.names[depth], quantizer.block, trace.calls_of(depth)
        # Playback skips computation, so it is off if the block passes data on to later blocks.
        hands_on = any(call.hands_on for call in calls.values())
        playback = None if hands_on else OutputCache(block, quantizer.specs, waiting)
        stream = BlockStream(name, block, trace.hidden, calls, self.context, playback)
        if self.original is None:
            return stream, None
        calls = self.original.calls_of(depth)
        return stream, BlockStream(name, copy.deepcopy(block), self.original.hidden, calls, self.context)

    def _take_shared(self, depth: int) -> None:
        """Load the stored values of parameters that the block shares with earlier blocks."""
        linears = {f"{linear.spec.name}.weight": linear for linear in self.plan.linears}
        model: nn.Module = self.model.skeleton
        for name, stored in self.plan.structure.shared_in(depth).items():
            planned = linears.get(stored)
            module = stored.rpartition(".")[0]
            names = [stored] if planned is None else [f"{module}.{suffix}" for suffix in planned.layout.tensors()]
            own = {part: self.recorder.read(part) for part in names} if self.context.team.first else None
            tensors = self.context.team.share_tensors(own)
            if planned is None:
                value = tensors[stored]
            else:
                value = planned.spec.turned(QuantizedWeight(planned.layout, by_suffix(module, tensors)).decode())
            parameter = model.get_parameter(name)
            parameter.data = value.to(parameter).contiguous()

    def _round_kept(self, block: str) -> bool:
        """Round norms and biases that were tuned in another dtype to their stored values; returns whether any value
        changed."""
        if self.plan.running is self.plan.source:
            return False
        model, changed = self.model.skeleton, False
        for name in self.plan.kept:
            if name.startswith(f"{block}."):
                tensor = operator.attrgetter(name)(model)
                rounded = tensor.to(self.plan.tensors[name][1]).to(tensor.dtype)
                changed |= not torch.equal(rounded, tensor)
                tensor.data = rounded
        return changed

    def _distill(self) -> None:
        """Tune the whole model. Every step needs the one before, so the first process does it alone."""
        samples, trace, original = self.samples, self.trace, self.original
        stored = StoredModel(self.plan, self.model, self.recorder.read)
        assert samples is not None, "the recipe has data"
        assert trace is not None, "the samples were traced"
        assert original is not None, "the recipe follows the original"
        with self.clock.phase("distill"):
            self.recorder.keep_distilled(
                self.context.team.wait_for_first(lambda beat: stored.distill(trace, original.hidden, samples, beat))
            )
