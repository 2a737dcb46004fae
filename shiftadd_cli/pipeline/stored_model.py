"""The compressed model of an unfinished checkpoint, run block by block from its stored tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shiftadd_cli.blockwise.forward import first_input
from shiftadd_cli.blockwise.head import Head
from shiftadd_cli.blockwise.hidden_states import HiddenStates
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.passage import Passage
from shiftadd_cli.blockwise.trace import Trace
from shiftadd_cli.data.images import image_reader
from shiftadd_cli.distillation.block import TunedBlock
from shiftadd_cli.distillation.distill import Distillation, Distiller
from shiftadd_cli.distillation.end import EndGap
from shiftadd_cli.distillation.stack import Stack
from shiftadd_cli.distillation.vectors import Reader
from shiftadd_cli.pipeline.plan import Plan
from shiftadd_cli.pipeline.tables import by_suffix, place_weight

# Number of tokens in the final check of a run without data.
_CHECKED_TOKENS = 32


@dataclass(frozen=True)
class StoredModel:
    """The result of `plan`. `model` is the original in the compute dtype; `read` returns tensors as written."""

    plan: Plan
    model: BlockwiseModel
    read: Reader

    def distill(
        self, trace: Trace, targets: HiddenStates, samples: Tensor, after_step: Callable[[], object]
    ) -> Distillation:
        """Tune the whole model towards the original's hidden states after its last block; see `Distiller.run`.

        trace: of the quantized model.
        """
        recipe, device, skeleton = self.plan.recipe, self.model.device, self.model.skeleton
        with self.model.outside(self._buffers()):
            heads = [f"{table.reader}.weight" for table in self.plan.tables if table.reader is not None]
            originals = {name: skeleton.get_parameter(name).detach().clone() for name in heads}
            self._decode_tables()
            blocks = [self._block(depth) for depth in range(len(self.model.names))]
            distiller = Distiller(
                Stack(blocks, trace.calls, device),
                EndGap(self.model, trace.forms, samples, self.read, originals),
                lambda span: trace.passage.states[0].pack(first_input(self.model, samples[span])),
                targets,
                recipe.batch_size,
            )
            return distiller.run(
                epochs=recipe.distill_epochs,
                seed=recipe.seed,
                progress=self.model.context.progress,
                after_step=after_step,
            )

    def predict(self, sample: Tensor | None, passage: Passage | None) -> tuple[Tensor, Tensor]:
        """The sample, by default of random numbers, cut to what fits in memory, and the predictions for it.

        passage: of the original, by default traced with the sample.
        """
        model, within = self.model, tuple(f"{name}." for name in self.model.names)
        if sample is None:
            sample = self._random_sample()
        if passage is None:
            with model.outside():
                passage = Passage.of(model, sample)
        with model.outside(self._buffers()), torch.no_grad():
            self._decode_tables()
            for name in self.plan.kept:
                if not name.startswith(within):
                    tensor = operator.attrgetter(name)(model.skeleton)
                    tensor.data = self.read(name).to(tensor)
            sample = passage.cut(sample)
            entering, arguments = passage.arguments(sample)
            state = passage.states[0].pack(entering)
            for depth, _ in enumerate(model.context.progress(model.names, "Checking the written files")):
                block = self._block(depth)
                state = block.run(passage.recorded_call(depth, arguments), state, block.decoded())
            head = Head(model, passage.forms, sample)
            tokens = slice(0, state.shape[1]) if head.per_token else slice(None)
            return sample, head.predict(state, slice(0, 1), tokens).values

    def _decode_tables(self) -> None:
        """Give embeddings and heads their stored values."""
        for table in self.plan.tables:
            stored = {name: self.read(name) for name in table.tensors()}
            place_weight(table, self.model.skeleton, by_suffix(table.name, stored))

    def _buffers(self) -> list[str]:
        """Names of buffers in blocks, such as masks, which are not part of an artifact."""
        within = tuple(f"{name}." for name in self.model.names)
        return [name for name, _ in self.model.skeleton.named_buffers() if name.startswith(within)]

    def _block(self, depth: int) -> TunedBlock:
        """A block as it is stored, including copies of linears of other blocks."""
        name, shared = self.model.names[depth], self.model.structure.shared_in(depth)
        linears = []
        for planned in self.plan.linears:
            if planned.spec.block == depth:
                linears.append((planned.spec, planned.layout))
            for number, kind in planned.spec.copies:
                if number == depth:
                    linears.append((replace(planned.spec, kind=kind, block=depth), planned.layout))
        block = self.model.skeleton.get_submodule(name)
        return TunedBlock(name, block, linears, lambda path: self.read(shared.get(path, path)), self.model.device)

    def _random_sample(self) -> Tensor:
        source, generator = self.plan.source, torch.Generator().manual_seed(0)
        if source.reads_images:
            shape = image_reader(source).blank().shape
            return torch.randn((1, *shape), generator=generator)
        size: int = source.config.get_text_config().vocab_size
        return torch.randint(0, size, (1, _CHECKED_TOKENS), generator=generator)
