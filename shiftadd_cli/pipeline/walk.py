"""The walk of every process of a run through a model: run the samples through the blocks, and quantize each block."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from shiftadd_cli.bcq.weight import QuantizedWeight
from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.forward import first_input
from shiftadd_cli.blockwise.head import Head
from shiftadd_cli.blockwise.hidden_states import HiddenStates, States
from shiftadd_cli.blockwise.input_cache import InputCache
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.output_cache import OutputCache
from shiftadd_cli.blockwise.passage import Passage
from shiftadd_cli.blockwise.tensor_file import TensorFile
from shiftadd_cli.blockwise.trace import Trace, trace_model
from shiftadd_cli.calibration.gradients import squared_gradients
from shiftadd_cli.data.images import image_reader
from shiftadd_cli.device import move_parts
from shiftadd_cli.distillation.block import TunedBlock
from shiftadd_cli.distillation.distill import Distillation, Distiller
from shiftadd_cli.distillation.end import EndGap
from shiftadd_cli.distillation.stack import Stack
from shiftadd_cli.distillation.vectors import Reader
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.pipeline.account import PhaseClock
from shiftadd_cli.pipeline.block import BlockQuantizer
from shiftadd_cli.pipeline.plan import Plan
from shiftadd_cli.pipeline.tables import store_table
from shiftadd_cli.progress import BlockProgress, silent
from shiftadd_cli.report.schema import BlockReport, TableReport

# Number of tokens in the final check of a run without data.
_CHECKED_TOKENS = 32


@dataclass
class Walk:
    """Runs `samples` (None for a run without data) through the blocks of `plan`.

    The processes of a `team` call the same methods in the same order. The first has all hidden states, the others those
    of the batches that they run. `spill` is a folder for data kept out of memory, by default the system's own.
    """

    plan: Plan
    samples: Tensor | None
    device: torch.device
    clock: PhaseClock = field(default_factory=PhaseClock)
    team: Team = ALONE
    spill: Path | None = None
    token_weights: dict[str, Tensor] | None = None
    trace: Trace | None = None
    read: Reader | None = None

    @property
    def model(self) -> BlockwiseModel:
        """The model in the compute dtype."""
        return BlockwiseModel(self.plan.running, self.plan.structure, self.device)

    def store_tables(self, add: Callable[[str, Tensor], None]) -> list[TableReport]:
        """Pass the stored tensors of embeddings to `add`, and replace the model's weights by the decoded ones.

        Call this before running the model, so that the first block calibrates on the values of the artifact.
        """
        return [store_table(table, self.plan.running.skeleton(), add) for table in self.plan.tables]

    def trace_samples(
        self, hidden: Callable[[], States], states: dict[str, States], progress: BlockProgress = silent
    ) -> None:
        """Run the samples up to the first block, or use `states` of a resumed run.

        hidden: creates storage for hidden states; `states` is filled with them, by name. The parts outside the blocks
        must be materialised.
        """
        assert self.samples is not None, "there is something to trace"
        recipe = self.plan.recipe
        with self.clock.phase("trace"):
            move_parts(self.model.skeleton, self.model.structure.outside, self.device)
            first = states.get("quantized")
            if first is None:
                first = states["quantized"] = hidden()
            # The first process needs all batches, because it does the sequential steps, such as distillation, alone.
            own = None if self.team.first else self.team.shards(len(first)).own()
            trace = trace_model(
                self.model,
                self.samples,
                recipe.batch_size,
                first,
                batches=own,
                spill=self.spill,
                progress=progress,
            )
            if recipe.follows_original:
                trace.original = states.setdefault("original", first.copy())
            for hidden_states in (trace.hidden, trace.original):
                if hidden_states is not None:
                    hidden_states.hand_out(self.team)
        self.trace = trace

    def weigh_tokens(self, known: dict[str, Tensor] | None, progress: BlockProgress) -> None:
        """Set the token weights: squared gradients to the power of the recipe, normalized to mean 1. `known` are those
        of a resumed run."""
        if not self.plan.recipe.loss_aware:
            return
        with self.clock.phase("trace"):
            begun = self.team.share(known is not None)
            self.token_weights = self.team.share_tensors(known) if begun else self._weights(progress)

    def _weights(self, progress: BlockProgress) -> dict[str, Tensor]:
        assert self.samples is not None, "there is something to weigh"
        assert self.trace is not None, "it was traced"
        gradients = squared_gradients(
            self.model,
            self.samples,
            self.trace,
            seed=self.plan.recipe.seed,
            progress=progress,
            team=self.team,
        )
        powers = {name: square**self.plan.recipe.loss_aware for name, square in gradients.token_weights().items()}
        return {name: power / power.mean() for name, power in powers.items()}

    def quantize(self, depth: int, name: str) -> tuple[BlockQuantizer, BlockReport | None]:
        """Load and quantize block number `depth`, and run the samples through it; the caller releases it."""
        recipe = self.plan.recipe
        with self.clock.phase("read_and_write"):
            block = self.model.load(depth)
        specs = [linear.spec for linear in self.plan.linears if linear.spec.block == depth]
        bits = {linear.spec.name: linear.layout.format.choice for linear in self.plan.linears}
        shared = {path.removeprefix(f"{name}.") for path in self.plan.structure.shared_in(depth)}
        quantizer = BlockQuantizer(block, specs, recipe, self.clock, self.token_weights, bits, self.team, shared)
        if self.trace is None:
            quantizer.without_data()
            return quantizer, None
        with TensorFile(self.spill) as waiting:
            return quantizer, self._calibrate(quantizer, depth, name, waiting)

    def _calibrate(self, quantizer: BlockQuantizer, depth: int, name: str, waiting: TensorFile) -> BlockReport | None:
        recipe, trace, block = self.plan.recipe, self.trace, quantizer.block
        assert trace is not None, "it was traced"
        calls = {index: per_block[depth] for index, per_block in trace.calls.items()}
        # Playback skips computation, so it is off if the block passes data on to later blocks.
        playback = (
            None if any(call.hands_on for call in calls.values()) else OutputCache(block, quantizer.specs, waiting)
        )
        stream = BlockStream(block, trace.hidden, calls, self.device, playback)
        original, report = None, None
        if trace.original is not None:
            original = BlockStream(copy.deepcopy(block), trace.original, calls, self.device)
        self._take_shared(depth)
        if original is not None and recipe.asymmetric:
            quantizer.towards(original, stream, name, InputCache(waiting))
        else:
            quantizer.on(stream)
            if original is not None:
                with self.clock.phase("forward"):
                    original.advance(name, self.team)
        if original is not None and recipe.reconstruct_epochs and quantizer.specs:
            report = quantizer.reconstruct(name, stream, original)
            stream = replace(stream, playback=None)
        if self._round_kept(name):
            stream = replace(stream, playback=None)
        if depth + 1 < len(self.plan.structure.blocks):
            with self.clock.phase("forward"):
                # The next block calibrates on the outputs of the quantized block.
                stream.advance(name, self.team)
        return report

    def _take_shared(self, depth: int) -> None:
        """Load the stored values of parameters that the block shares with earlier blocks."""
        shared = self.plan.structure.shared_in(depth)
        if not shared:
            return
        linears = {f"{linear.spec.name}.weight": linear for linear in self.plan.linears}
        model = self.plan.running.skeleton()
        for name, stored in shared.items():
            planned = linears.get(stored)
            module = stored.rpartition(".")[0]
            names = [stored] if planned is None else [f"{module}.{suffix}" for suffix in planned.layout.tensors()]
            own = {part: self.read(part) for part in names} if self.team.first and self.read is not None else None
            tensors = self.team.share_tensors(own)
            if planned is None:
                value = tensors[stored]
            else:
                suffixes = {part.removeprefix(f"{module}."): tensor for part, tensor in tensors.items()}
                value = planned.spec.turned(QuantizedWeight(planned.layout, suffixes).decode())
            parameter = model.get_parameter(name)
            parameter.data = value.to(parameter).contiguous()

    def _round_kept(self, block: str) -> bool:
        """Round norms and biases that were tuned in another dtype to their stored values; returns whether any value
        changed."""
        if self.plan.running is self.plan.source:
            return False
        model, changed = self.plan.running.skeleton(), False
        for name in self.plan.kept:
            if name.startswith(f"{block}."):
                tensor = operator.attrgetter(name)(model)
                rounded = tensor.to(self.plan.tensors[name][1]).to(tensor.dtype)
                changed |= not torch.equal(rounded, tensor)
                tensor.data = rounded
        return changed

    def distill(self, read: Reader, progress: BlockProgress) -> Distillation:
        """Tune the whole model after all blocks have been quantized and written; `read` returns the written tensors.

        The first process of a team does this alone, since every step needs the one before; the others `stand_by`.
        """
        trace, samples, recipe = self.trace, self.samples, self.plan.recipe
        assert trace is not None, "it was traced"
        assert trace.original is not None, "the recipe follows the original"
        assert samples is not None, "there are samples"
        with self.clock.phase("distill"), self.model.outside(self._buffers()):
            self.store_tables(lambda name, tensor: None)
            blocks = [self._stored_block(depth, read) for depth in range(len(self.model.names))]
            distiller = Distiller(
                Stack(blocks, trace.calls, self.device),
                EndGap(self.model, trace.forms, samples, read),
                lambda span: trace.passage.states[0].pack(first_input(self.model, samples[span])),
                trace.original,
                recipe.batch_size,
            )
            return distiller.run(
                epochs=recipe.distill_epochs,
                seed=recipe.seed,
                progress=progress,
                after_step=lambda: self.team.share(True),
            )

    def predict_stored(self, read: Reader, progress: BlockProgress) -> tuple[Tensor, Tensor]:
        """A sample, and its predictions by the stored tensors, decoded and run block by block.

        `read` returns tensors as they were written. Without data the sample consists of random numbers.
        """
        model, within = self.model, tuple(f"{name}." for name in self.model.names)
        sample = self._any_sample() if self.samples is None else self.samples[:1]
        if self.trace is not None:
            passage = self.trace.passage
        else:
            with model.outside():
                passage = Passage.of(model, sample, progress)
        with model.outside(self._buffers()):
            self.store_tables(lambda name, tensor: None)
            for name in self.plan.kept:
                if not name.startswith(within):
                    tensor = operator.attrgetter(name)(model.skeleton)
                    tensor.data = read(name).to(tensor)
            sample = passage.cut(sample)
            with torch.no_grad():
                entering, arguments = passage.arguments(sample)
                state = passage.states[0].pack(entering)
                for depth, _ in enumerate(progress(model.names, "Checking the written files")):
                    block = self._stored_block(depth, read)
                    state = block.run(passage.recorded_call(depth, arguments), state, block.decoded())
                head = Head(model, passage.forms, sample)
                tokens = slice(0, state.shape[1]) if head.per_token else slice(None)
                return sample, head.predict(state, slice(0, 1), tokens).values

    def _buffers(self) -> list[str]:
        """Names of buffers in blocks, such as masks, which are not part of an artifact."""
        within = tuple(f"{name}." for name in self.model.names)
        return [name for name, _ in self.model.skeleton.named_buffers() if name.startswith(within)]

    def _stored_block(self, depth: int, read: Reader) -> TunedBlock:
        """A block as it is stored, including copies of linears of other blocks."""
        name, shared = self.plan.structure.blocks[depth], self.plan.structure.shared_in(depth)
        linears = []
        for planned in self.plan.linears:
            if planned.spec.block == depth:
                linears.append((planned.spec, planned.layout))
            for number, kind in planned.spec.copies:
                if number == depth:
                    linears.append((replace(planned.spec, kind=kind, block=depth), planned.layout))
        block = self.plan.running.skeleton().get_submodule(name)
        return TunedBlock(name, block, linears, lambda path: read(shared.get(path, path)), self.device)

    def _any_sample(self) -> Tensor:
        source, generator = self.plan.source, torch.Generator().manual_seed(0)
        if source.reads_images:
            shape = image_reader(source).blank().shape
            return torch.randn((1, *shape), generator=generator)
        size: int = source.config.get_text_config().vocab_size
        return torch.randint(0, size, (1, _CHECKED_TOKENS), generator=generator)

    def stand_by(self) -> None:
        """Wait while the first process distills; it sends a message after every step and at the end."""
        while self.team.share(False):
            continue


def follow(plan: Plan, samples: Tensor | None, device: torch.device, team: Team) -> None:
    """Do the work of a process that is not the first of `team`; the first calls `run_plan`."""
    walk, names = Walk(plan, samples, device, team=team), plan.structure.blocks
    done, running = team.share([0, False])
    plan.running.materialise(plan.structure.outside)
    walk.store_tables(lambda name, tensor: None)
    if running:
        assert samples is not None, "there are samples to run"
        walk.trace_samples(lambda: HiddenStates(len(samples), plan.recipe.batch_size, partial=True), {})
        walk.weigh_tokens(None, silent)
    plan.running.release(plan.structure.outside)
    for depth, name in enumerate(names[done:], done):
        walk.quantize(depth, name)
        walk.model.release(depth)
    if plan.recipe.distill_epochs:
        walk.stand_by()
