"""What the finished parts of a block give out, noted in one run of it and played back in the next ones.

While a block is quantized it runs once for each group of its linears, as each group changes what the next ones read.
What lies before a group has not changed since, and need not be computed again: a linear is finished once it is
quantized, and a module around linears (attention, say) once all of these are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from shiftadd_cli.blockwise.tensor_file import TensorFile


class OutputCache:
    """Outputs of the parts of `block`, in which the linears `linears` are quantized, kept in `file`.

    The block as a whole is no part of it. Of a part that gives out anything but tensors its own parts are played back,
    and of one that is called several times in a run the first call is.
    """

    def __init__(self, block: nn.Module, linears: Collection[str], file: TensorFile) -> None:
        self._block, self._file = block, file
        self._open = set(linears)
        # Parts with linears in them, or that are one, and which.
        self._linears: dict[str, set[str]] = {}
        for linear in linears:
            path = linear.split(".")
            for end in range(1, len(path) + 1):
                self._linears.setdefault(".".join(path[:end]), set()).add(linear)
        # By batch and part: for each place of the output whether there is a tensor. No tuple: the output is a tensor.
        self._forms: dict[tuple[int, str], list[bool] | None] = {}
        self._unfit: set[str] = set()

    def finish(self, linears: Collection[str]) -> None:
        """These linears will not change any more."""
        self._open.difference_update(linears)

    @contextmanager
    def during(self, index: int) -> Iterator[None]:
        """While batch `index` runs through the block, parts that were finished before its last run give out what they
        gave then, and what others that are finished give is noted, as long as there is a run to come."""
        with ExitStack() as stack:
            self._prepare("", self._block, index, stack, note=bool(self._open))
            yield

    def _prepare(self, prefix: str, module: nn.Module, index: int, stack: ExitStack, *, note: bool) -> None:
        for child_name, child in module.named_children():
            name = f"{prefix}{child_name}"
            if name not in self._linears:
                continue
            finished = not self._linears[name] & self._open and name not in self._unfit
            if finished and (index, name) in self._forms:
                stack.callback(_instead_once(child, partial(self._noted, index, name)))
                continue
            if finished and note:
                stack.callback(child.register_forward_hook(partial(self._note, index, name)).remove)
            # What is in a part that is noted as a whole will not be asked for again.
            self._prepare(f"{name}.", child, index, stack, note=note and not finished)

    def _note(self, index: int, name: str, module: nn.Module, args: Any, output: Any) -> None:
        parts = output if type(output) is tuple else (output,)
        if not all(isinstance(each, Tensor | None) for each in parts) or output is None:
            self._unfit.add(name)
        if name in self._unfit or (index, name) in self._forms:
            return
        for place, part in enumerate(parts):
            if part is not None:
                self._file[index, name, place] = part
        self._forms[index, name] = [part is not None for part in parts] if type(output) is tuple else None

    def _noted(self, index: int, name: str) -> Any:
        form = self._forms[index, name]
        device = next(self._block.parameters()).device
        if form is None:
            return self._file[index, name, 0].to(device)
        return tuple(self._file[index, name, place].to(device) if there else None for place, there in enumerate(form))


def _instead_once(module: nn.Module, output: Callable[[], Any]) -> Callable[[], None]:
    """Let the first call of `module` give `output`; what is returned undoes it."""
    compute = module.forward
    before = module.__dict__.get("forward")
    waiting = [output]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return waiting.pop()() if waiting else compute(*args, **kwargs)

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    module.forward = forward
    return undo
