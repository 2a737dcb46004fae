"""How a model calls its blocks, recorded for every batch and checked against the model's own forward.

Two samples run through the model's own forward, with each block loaded for its turn only. The first shows what passes
from block to block. The second is also run block by block, from recorded calls, and both must agree: in the inputs of
every block, in every argument, and in the predictions. A model that does not fit is refused, and never calibrated on
inputs that are not its own.

Then every batch runs up to its blocks, which are stood in for, and its arguments are recorded: masks, positions, and
what depends on the tokens, such as Gemma 3n's inputs of each layer. Tensors that are the same for all batches (masks
and positions usually are) are kept once; the others wait in a file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.calibration.calls import (
    PLAIN_LAYOUT,
    BlockCall,
    Carried,
    CarriedForm,
    Layout,
    Path,
    Spilled,
    StateForm,
    argument_name,
    hidden_of,
    leaves,
    rebuilt,
)
from shiftadd_cli.calibration.head import Form, Head, predict, run_model, standing_in
from shiftadd_cli.calibration.streams import HiddenStates, batch_span
from shiftadd_cli.calibration.tensor_file import TensorFile
from shiftadd_cli.errors import NumericalError, ShiftaddError, SourceError, first_line
from shiftadd_cli.progress import BlockProgress, silent
from shiftadd_cli.source import LinearSpec, Source, Structure
from shiftadd_cli.source.weight_reads import watching_weights

# Relative difference that a block may show between two runs on the same inputs: some kernels add in any order.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# The predictions of the second sample, in all copies that a model makes of its logits, stay below this.
LOGIT_BYTES = 1 << 30
BYTES_PER_LOGIT = 12


@dataclass
class Trace:
    """How a model calls its blocks for some samples.

    Attributes:
        hidden: the states that enter the first block.
        calls: `calls[batch][block]`, of the batches that this process runs.
        passage: what passes between the blocks.
        original: states of the original model at the same depth, for asymmetric calibration and block reconstruction.
    """

    hidden: HiddenStates
    passage: Passage
    calls: dict[int, list[BlockCall]] = field(default_factory=dict)
    original: HiddenStates | None = None

    @property
    def forms(self) -> list[Form]:
        """What each block gives out."""
        return self.passage.forms


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Leaves a forward where nothing more is needed: the head's logits would cost more than all the rest."""


def trace_model(
    source: Source,
    structure: Structure,
    samples: Tensor,
    batch_size: int,
    device: torch.device,
    hidden: HiddenStates | None = None,
    *,
    batches: Iterable[int] | None = None,
    spill: FilePath | None = None,
    progress: BlockProgress = silent,
) -> Trace:
    """Record how the model calls its blocks for `samples`, and run these up to the first block.

    samples: int64 `[samples, seq_len]` tokens, or `[samples, channels, height, width]` pixels for a vision model.
    hidden: where states are kept, by default in memory; batches that it holds already are not appended.
    batches: numbers of the batches whose calls are recorded, by default of all.
    spill: folder for arguments that differ from batch to batch, by default the system's own.

    Modules outside the blocks must be materialised on `device`; blocks are materialised and released here. Raises
    SourceError where running block by block is not what the model does, naming the block and the argument;
    NumericalError where weights or outputs of a block are not finite.
    """
    passage = Passage.of(source, structure, samples, device, progress)
    passage.check(samples[-1:], progress)
    states = HiddenStates(len(samples), batch_size) if hidden is None else hidden
    trace = Trace(states, passage)
    known = len(trace.hidden)
    recorder = _Recorder(passage, spill)
    count = -(-len(samples) // batch_size)
    recorded = set(range(count) if batches is None else batches)
    for index in range(count):
        if index < known and index not in recorded:
            continue
        entering, arguments = passage.arguments(samples[batch_span(index, batch_size, len(samples))])
        if index in recorded:
            trace.calls[index] = recorder.calls(index, arguments)
        if index >= known:
            trace.hidden.append(passage.states[0].pack(entering))
    return trace


def check_finite(hidden: Tensor, block: str) -> None:
    """Raise NumericalError naming the block whose output holds NaN or infinite values."""
    if not torch.isfinite(hidden).all():
        dtype = str(hidden.dtype).removeprefix("torch.")
        raise NumericalError(
            f"The output of {block} is not finite in {dtype}; use --dtype float32, or mend the source."
        )


def _check_weights(block: nn.Module, name: str) -> None:
    for parameter, weight in block.named_parameters():
        if not torch.isfinite(weight).all():
            raise NumericalError(
                f"{name}.{parameter} holds values that are not finite; the source checkpoint is damaged."
            )


def first_input(structure: Structure, model: nn.Module, batch: Tensor, device: torch.device) -> Tensor:
    """Hidden states that enter the first block, by a model whose parts outside the blocks are on `device`."""
    entered: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(_split(args, kwargs)[0].detach())
        raise StopForward

    handle = model.get_submodule(structure.blocks[0]).register_forward_pre_hook(stop, with_kwargs=True)
    with hooked([handle]), suppress(StopForward), torch.no_grad():
        run_model(model, batch.to(device))
    if not entered:
        raise SourceError(
            f"The model never calls its first block {structure.blocks[0]}; its architecture is not supported."
        )
    return entered[0]


@dataclass
class _Own:
    """One block's call in the model's own forward.

    Attributes:
        tree: its arguments before the call, in containers of their own; before, after: their leaves around the call.
        others: what it gives out beside hidden states, by path; None where it returns these bare.
    """

    tree: dict[str, Any]
    before: dict[Path, Any]
    after: dict[Path, Any] = field(default_factory=dict)
    others: dict[Path, Any] | None = None


@dataclass
class Passage:
    """What passes between the blocks of a model.

    Attributes:
        trees: the arguments of each block with `Carried` where they come from other blocks.
        states: forms of the states, before the first block, between blocks and behind the last.
        carried_from: see `BlockCall`, of each block.
        forms: what each block gives out.
    """

    source: Source
    structure: Structure
    device: torch.device
    trees: list[dict[str, Any]] = field(default_factory=list)
    states: list[StateForm] = field(default_factory=list)
    carried_from: list[tuple[int | Path, ...]] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        source: Source,
        structure: Structure,
        samples: Tensor,
        device: torch.device,
        progress: BlockProgress = silent,
    ) -> Passage:
        """Found by the first sample in the model's own forward."""
        passage = cls(source, structure, device)
        layout = passage._layout(samples)
        own: list[_Own] = []

        def left(_: nn.Module, call: _Own, entered: Tensor, output: Tensor) -> None:
            own.append(call)
            before, behind = (tuple(layout.pack(hidden).shape[1:]) for hidden in (entered, output))
            others = None if call.others is None else len(call.others)
            passage.forms.append(Form(before, behind, others, output.dtype, layout))

        passage._own_forward(samples[:1], left, progress, "Tracing", with_head=False)
        passage._follow(own, layout)
        _, recorded = passage.arguments(samples[:1])
        passage._compare_arguments(own, recorded)
        return passage

    @property
    def model(self) -> Any:
        return self.source.skeleton()

    def call(self, depth: int, leaf: Callable[[Path, Any], Any]) -> BlockCall:
        """The call of block number `depth`, with `leaf(path, value)` for arguments that no other block gives."""
        tree = rebuilt(
            self.trees[depth], lambda path, value: value if isinstance(value, Carried) else leaf(path, value)
        )
        return BlockCall(
            tree["args"], tree["kwargs"], self.states[depth], self.states[depth + 1], self.carried_from[depth]
        )

    def recorded_call(self, depth: int, arguments: Sequence[Mapping[Path, Any]]) -> BlockCall:
        """The same with what `arguments` gave."""
        return self.call(depth, partial(_replaced, arguments[depth]))

    def arguments(self, samples: Tensor) -> tuple[Tensor, list[dict[Path, Any]]]:
        """Hidden states that enter the first block, and the leaves of the arguments of every block, for a batch."""
        entered: list[Tensor] = []
        arguments: list[dict[Path, Any]] = []
        names = self.structure.blocks

        def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._check_order(name, len(arguments))
            hidden, rest, named = _split(args, kwargs)
            if not entered:
                entered.append(hidden)
            arguments.append(dict(leaves({"args": rest, "kwargs": named})))
            if len(arguments) == len(names):
                raise StopForward

        blocks = [self.model.get_submodule(name) for name in names]
        handles = [
            block.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
            )
            for name, block in zip(names, blocks, strict=True)
        ]
        with (
            self._refusing_failures(),
            standing_in(blocks, self.forms),
            hooked(handles),
            suppress(StopForward),
            torch.no_grad(),
        ):
            run_model(self.model, samples.to(self.device))
        self._check_count(len(arguments))
        return entered[0], arguments

    def cut(self, samples: Tensor) -> Tensor:
        """Texts as far as the predictions of one of them may be in memory at once."""
        if self.source.reads_images:
            return samples
        vocabulary = self.model.config.get_text_config().vocab_size
        return samples[:, : max(1, LOGIT_BYTES // (BYTES_PER_LOGIT * vocabulary))]

    def check(self, sample: Tensor, progress: BlockProgress) -> None:
        """Run one sample through the model's own forward and through recorded calls, and compare.

        Raises SourceError naming the block, and the argument where it is one, at the first difference.
        """
        sample = self.cut(sample)
        entering, recorded = self.arguments(sample)
        state = self.states[0].pack(entering)
        own: list[_Own] = []

        def left(block: nn.Module, call: _Own, entered: Tensor, output: Tensor) -> None:
            nonlocal state
            depth, name = len(own), self.structure.blocks[len(own)]
            hidden, carried = self.states[depth].unpack(state)
            self._compare(hidden, entered, f"The input of {name}")
            for path, leaf in leaves(self.trees[depth]):
                if isinstance(leaf, Carried):
                    self._compare(carried[leaf.number], call.before[path], f"{argument_name(path)} of {name}")
            replayed = self.recorded_call(depth, recorded)
            with torch.no_grad():
                # Not by calling the block, whose hooks are those of the model's own forward.
                state = replayed.run(block.forward, state)
            self._compare(self.states[depth + 1].unpack(state)[0], output, f"The output of {name}")
            own.append(call)

        logits = self._own_forward(sample, left, progress, "Checking", with_head=True)
        self._compare_arguments(own, recorded)
        head = Head(self.model, self.structure, self.forms, sample, self.device)
        tokens = state.shape[1]
        # As the passes over predictions do: in slices, which a head that mixes tokens would show.
        parts = list(head.parts(1, tokens, max(1, -(-tokens // 2))))
        with self._refusing_failures(), torch.no_grad():
            values = [head.predict(state[rows, cut], rows, cut).values for rows, cut in parts]
        assert logits is not None, "the forward ran to its end"
        self._compare(torch.cat(values, 1) if len(values) > 1 else values[0], logits, "The output of the head")

    def _own_forward(
        self,
        sample: Tensor,
        left: Callable[[nn.Module, _Own, Tensor, Tensor], None],
        progress: BlockProgress,
        text: str,
        *,
        with_head: bool,
    ) -> Tensor | None:
        """The model's own forward; returns its predictions if it runs `with_head`.

        left: called behind each block, which is still in memory, with its call and the hidden states around it.
        """
        names, shown = self.structure.blocks, iter(progress(self.structure.blocks, text))
        calls: list[_Own] = []
        previous: list[Tensor] = []
        watched: list[set[str]] = []
        watch = ExitStack()
        linears_of: dict[int, list[LinearSpec]] = {}
        for spec in self.structure.linears:
            linears_of.setdefault(spec.block, []).append(spec)

        def before(name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._check_order(name, len(calls))
            next(shown, None)
            hidden, rest, named = _split(args, kwargs)
            if previous and not torch.equal(previous.pop(), hidden):
                raise SourceError(
                    f"{type(self.model).__name__} changes the hidden states before {name}; its architecture is not "
                    "supported."
                )
            arguments = {"args": rest, "kwargs": named}
            calls.append(_Own(rebuilt(arguments, lambda _, leaf: leaf), dict(leaves(arguments))))
            self.source.materialise([name])
            _check_weights(block, name)
            block.to(self.device)
            linears = {spec.name: self.model.get_submodule(spec.name) for spec in linears_of.get(len(calls) - 1, ())}
            watched.append(watch.enter_context(watching_weights(block, linears)))

        def after(name: str, block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            watch.close()
            for spec in linears_of.get(len(calls) - 1, ()):
                if spec.name in watched[-1]:
                    raise SourceError(
                        f"{type(self.model).__name__} computes with the weight of {spec.name} itself, so it cannot be "
                        f"compressed; leave it as it is with --skip '*.{spec.kind}'."
                    )
            call, result = calls[-1], hidden_of(output)
            check_finite(result, name)
            entered, rest, named = _split(args, kwargs)
            call.after = dict(leaves({"args": rest, "kwargs": named}))
            if isinstance(output, (tuple, list)):
                call.others = {("output", number): leaf for number, leaf in enumerate(output) if number}
            # A model may change in place what a block gave it.
            previous[:] = [result.clone()]
            left(block, call, entered, result)
            self.source.release([name])
            if name == names[-1]:
                next(shown, None)
                if not with_head:
                    raise StopForward

        handles = []
        for name in names:
            block = self.model.get_submodule(name)
            handles.append(
                block.register_forward_pre_hook(lambda m, a, k, name=name: before(name, m, a, k), with_kwargs=True)
            )
            handles.append(
                block.register_forward_hook(lambda m, a, k, o, name=name: after(name, m, a, k, o), with_kwargs=True)
            )
        values = None
        with self._refusing_failures(), watch, hooked(handles), suppress(StopForward), torch.no_grad():
            values = predict(self.model, sample.to(self.device)).values
        self._check_count(len(calls))
        return values

    def _layout(self, samples: Tensor) -> Layout:
        """Where hidden states have their batch and tokens; where that does not show, found by running other sizes."""

        def entering(some: Tensor) -> Tensor:
            with self._refusing_failures():
                return first_input(self.structure, self.model, some, self.device)

        hidden = entering(samples[:1])
        usual = hidden.ndim == 3 and len(hidden) == 1
        if usual and (self.source.reads_images or hidden.shape[1] == samples.shape[1]):
            return PLAIN_LAYOUT
        batch = _grown_axis(hidden, entering(samples[:1].repeat(2, *[1] * (samples.ndim - 1))))
        tokens = None
        if not self.source.reads_images and samples.shape[1] > 1:
            tokens = _grown_axis(entering(samples[:1, :-1]), hidden)
        if batch is None or tokens is None:
            raise SourceError(
                f"The hidden states of {type(self.model).__name__} have shape {list(hidden.shape)} for one sample, in "
                "which samples and tokens have no axes of their own; its architecture is not supported."
            )
        rest = tuple(size for axis, size in enumerate(hidden.shape) if axis not in (batch, tokens))
        return Layout(batch, tokens, rest)

    def _follow(self, own: Sequence[_Own], layout: Layout) -> None:
        """Find which arguments are tensors that blocks before computed, and the forms of all states."""
        # All of these tensors are alive, so that no two have one id.
        produced: dict[int, tuple[int, Path, Tensor]] = {}
        origins: list[dict[Path, int]] = []
        for depth, call in enumerate(own):
            origins.append({path: id(leaf) for path, leaf in call.before.items() if id(leaf) in produced})
            given = {id(leaf) for leaf in call.before.values()}
            for path, leaf in [*(call.others or {}).items(), *call.after.items()]:
                if isinstance(leaf, Tensor) and id(leaf) not in given:
                    produced[id(leaf)] = (depth, path, leaf)
        last_use = {key: depth for depth, keys in enumerate(origins) for key in keys.values()}
        entering: list[int] = []
        self.states = [StateForm(layout)]
        for depth, call in enumerate(own):
            numbers = {key: number for number, key in enumerate(entering)}
            carried = {path: Carried(numbers[key]) for path, key in origins[depth].items()}
            self.trees.append(rebuilt(call.tree, partial(_replaced, carried)))
            fresh = [key for key, (block, *_) in produced.items() if block == depth]
            leaving = [key for key in [*entering, *fresh] if last_use.get(key, 0) > depth]
            self.carried_from.append(tuple(numbers[key] if key in numbers else produced[key][1] for key in leaving))
            forms = tuple(self._carried_form(produced[key][2], depth) for key in leaving)
            self.states.append(StateForm(layout, self.forms[depth].dtype, forms))
            entering = leaving

    def _carried_form(self, tensor: Tensor, depth: int) -> CarriedForm:
        if tensor.ndim < 2 or len(tensor) != 1:
            raise SourceError(
                f"{self.structure.blocks[depth]} hands later blocks a tensor of shape {list(tensor.shape)} "
                f"({tensor.dtype}), which is not one of each sample; its architecture is not supported."
            )
        return CarriedForm(tuple(tensor.shape[1:]), tensor.dtype)

    def _compare_arguments(self, own: Sequence[_Own], recorded: Sequence[Mapping[Path, Any]]) -> None:
        """Refuse arguments that blocks change or compute in a way that was not followed."""
        for depth, call in enumerate(own):
            name = self.structure.blocks[depth]
            tree = dict(leaves(self.trees[depth]))
            given = {path for path, leaf in tree.items() if not isinstance(leaf, Carried)}
            for path in given ^ (recorded[depth].keys() - (tree.keys() - given)):
                raise self._dependent(path, name)
            for path in given:
                mine, theirs = recorded[depth][path], call.before[path]
                if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
                    if mine.shape != theirs.shape or not _alike(mine, theirs):
                        raise self._dependent(path, name)
                elif type(mine) is not type(theirs) or (_is_plain(mine) and mine != theirs):
                    raise self._dependent(path, name)

    def _dependent(self, path: Path, block: str) -> SourceError:
        return SourceError(
            f"The argument {self._argument(path, block)} of {block} depends on the outputs of other blocks in a way "
            f"that cannot be followed; {type(self.model).__name__} is not supported."
        )

    def _argument(self, path: Path, block: str) -> str:
        """The name of an argument; of a positional one its parameter's."""
        if len(path) > 1 and path[0] == "args":
            names = list(inspect.signature(self.model.get_submodule(block).forward).parameters)
            if path[1] + 1 < len(names):
                path = (names[path[1] + 1], *path[2:])
        return argument_name(path)

    def _compare(self, replayed: Tensor, own: Tensor, what: str) -> None:
        """Refuse a difference beyond rounding."""
        model = type(self.model).__name__
        if replayed.shape != own.shape:
            raise SourceError(
                f"{what} has shape {list(own.shape)} in the forward of {model} and {list(replayed.shape)} where its "
                "blocks run one by one; its architecture is not supported."
            )
        scale, difference = float(own.float().norm()), float((replayed.float() - own.float()).norm())
        if not difference <= _ROUNDING.get(own.dtype, 1e-4) * max(scale, 1e-30):
            share = difference / scale if scale else float("inf")
            raise SourceError(
                f"{what} differs by {share:.1%} between the forward of {model} and its blocks run one by one, so it "
                "would be calibrated on inputs that are not its own; its architecture is not supported."
            )

    @contextmanager
    def _refusing_failures(self) -> Iterator[None]:
        """Turn what the model's code raises on samples alone, or without its blocks, into a refusal."""
        try:
            yield
        except (ShiftaddError, StopForward):
            raise
        except Exception as error:  # code of any model may fail in any way
            raise SourceError(
                f"{type(self.model).__name__} cannot be run block by block ({first_line(error)}); its architecture is "
                "not supported."
            ) from error

    def _check_order(self, name: str, done: int) -> None:
        names = self.structure.blocks
        if done >= len(names) or name != names[done]:
            again = "more than once" if name in names[:done] else "out of order"
            raise SourceError(
                f"{type(self.model).__name__} calls its block {name} {again}; its architecture is not supported."
            )

    def _check_count(self, done: int) -> None:
        if done != len(self.structure.blocks):
            raise SourceError(
                f"{type(self.model).__name__} calls {done} of its {len(self.structure.blocks)} blocks "
                f"({self.structure.blocks[done]} is not called); its architecture is not supported."
            )


class _Recorder:
    """Makes calls of recorded arguments, and keeps tensors that all batches share once."""

    def __init__(self, passage: Passage, spill: FilePath | None) -> None:
        self._passage, self._spill = passage, spill
        self._first: list[dict[Path, Any]] | None = None
        self._file: TensorFile | None = None

    def calls(self, index: int, arguments: list[dict[Path, Any]]) -> list[BlockCall]:
        """The calls of batch number `index`."""
        if self._first is None:
            self._first = arguments
        # The same tensor at several blocks (a mask, the embeddings) is kept once.
        kept: dict[int, Any] = {}
        calls = []
        for depth, own in enumerate(arguments):
            for path, leaf in own.items():
                if isinstance(leaf, Tensor) and id(leaf) not in kept:
                    kept[id(leaf)] = self._kept(index, depth, path, leaf)
            stored = {path: kept.get(id(leaf), leaf) for path, leaf in own.items()}
            calls.append(self._passage.call(depth, partial(_replaced, stored)))
        return calls

    def _kept(self, index: int, depth: int, path: Path, leaf: Tensor) -> Any:
        assert self._first is not None, "the first batch was recorded"
        first = self._first[depth].get(path)
        if isinstance(first, Tensor) and (leaf is first or (leaf.shape == first.shape and _alike(leaf, first))):
            return first
        if self._file is None:
            self._file = TensorFile(self._spill)
        key = (index, depth, path)
        self._file[key] = leaf
        return Spilled(self._file, key, self._passage.device)


def _grown_axis(small: Tensor, large: Tensor) -> int | None:
    """The one axis in which `large` is larger; None where there is no such."""
    if small.ndim != large.ndim:
        return None
    grown = [axis for axis in range(small.ndim) if small.shape[axis] != large.shape[axis]]
    return grown[0] if len(grown) == 1 else None


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same values; NaN is like NaN."""
    if one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    return one.is_floating_point() and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def _replaced(stand_ins: Mapping[Path, Any], path: Path, leaf: Any) -> Any:
    return stand_ins.get(path, leaf)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states, the other positional arguments and the named ones, of a block's call."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Remove the hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
