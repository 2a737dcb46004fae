"""Outputs of the finished parts of a block, recorded in one run and played back in the next ones.

A block that is being quantized runs once for each group of its linears, because each group changes the inputs of the
next ones. The parts before a group have not changed since the last run, so they are not computed again. A linear is
finished once it is quantized, and a module that contains linears (attention, say) once all of them are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from shiftadd_cli.blockwise.tensor_file import TensorFile


class OutputCache:
    """Outputs of the parts of `block`, stored in `file`; `linears` are the linears that are quantized.

    The block itself is not a part. If a part returns anything but tensors, only the parts inside it are played back.
    If a part is called several times in a run, only its first call is played back.
    """

    def __init__(self, block: nn.Module, linears: Collection[str], file: TensorFile) -> None:
        self._block, self._file = block, file
        self._open = set(linears)
        # The linears in each part that contains some; a linear is a part too.
        self._linears: dict[str, set[str]] = {}
        for linear in linears:
            path = linear.split(".")
            for end in range(1, len(path) + 1):
                self._linears.setdefault(".".join(path[:end]), set()).add(linear)
        # By batch and part: whether each item of the output tuple is a tensor. None: the output is a bare tensor.
        self._forms: dict[tuple[int, str], list[bool] | None] = {}
        self._unfit: set[str] = set()

    def finish(self, linears: Collection[str]) -> None:
        """Mark these linears as final."""
        self._open.difference_update(linears)

    @contextmanager
    def during(self, index: int) -> Iterator[None]:
        """Play back the parts that were finished before the last run of batch `index`, within the context. The outputs
        of the other finished parts are recorded, as long as another run follows."""
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
            # The parts inside a recorded part are not needed again.
            self._prepare(f"{name}.", child, index, stack, note=note and not finished)

    def _note(self, index: int, name: str, module: nn.Module, args: Any, output: Any) -> None:
        parts = output if type(output) is tuple else (output,)
        if not all(isinstance(item, Tensor | None) for item in parts) or output is None:
            self._unfit.add(name)
        if name in self._unfit or (index, name) in self._forms:
            return
        for position, part in enumerate(parts):
            if part is not None:
                self._file[index, name, position] = part
        self._forms[index, name] = [part is not None for part in parts] if type(output) is tuple else None

    def _noted(self, index: int, name: str) -> Any:
        form = self._forms[index, name]
        device = next(self._block.parameters()).device
        if form is None:
            return self._file[index, name, 0].to(device)
        return tuple(
            self._file[index, name, position].to(device) if is_tensor else None
            for position, is_tensor in enumerate(form)
        )


def _instead_once(module: nn.Module, output: Callable[[], Any]) -> Callable[[], None]:
    """Make the first call of `module` return `output`; the returned function undoes this."""
    compute = module.forward
    original = module.__dict__.get("forward")
    waiting = [output]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return waiting.pop()() if waiting else compute(*args, **kwargs)

    def undo() -> None:
        if original is None:
            del module.forward
        else:
            module.forward = original

    module.forward = forward
    return undo
