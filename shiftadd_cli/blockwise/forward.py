"""A model's own forward: running it, watching it, and stopping it early."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.device import dtype_name
from shiftadd_cli.errors import NumericalError, SourceError
from shiftadd_cli.source.vision import IMAGE_INPUT

# Image features of a model without class scores, best first; without these, its last hidden states are averaged.
_FEATURES = ("image_embeds", "pooler_output")


def run_model(model: Any, samples: Tensor) -> Any:
    """Run the model's own forward on int64 tokens `[batch, seq_len]`, or on pixels `[batch, channels, height, width]`,
    which are cast to its dtype."""
    if model.main_input_name == IMAGE_INPUT:
        return model(**{IMAGE_INPUT: samples.to(model.dtype)})
    return model(input_ids=samples, use_cache=False)


class Prediction(NamedTuple):
    """A model's predictions for its samples: `values` are logits `[..., classes]`, or features `[batch, width]` for a
    vision model without a head."""

    values: Tensor
    is_logits: bool


def predict(model: Any, samples: Tensor) -> Prediction:
    """Logits, or features where the model has no head; see `run_model` and `_FEATURES`."""
    output = run_model(model, samples)
    if (logits := getattr(output, "logits", None)) is not None:
        return Prediction(logits, True)
    for name in _FEATURES:
        if (features := getattr(output, name, None)) is not None:
            return Prediction(features, False)
    return Prediction(output.last_hidden_state.mean(1), False)


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Stops a forward where nothing more is needed: the head's logits would cost more than everything else."""


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Remove the hooks on exit, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states, the other positional arguments and the keyword arguments of a block's call."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def first_input(model: BlockwiseModel, batch: Tensor) -> Tensor:
    """The hidden states that enter the first block; the parts outside the blocks must be loaded."""
    entered: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(split_call(args, kwargs)[0].detach())
        raise StopForward

    handle = model.skeleton.get_submodule(model.names[0]).register_forward_pre_hook(stop, with_kwargs=True)
    with hooked([handle]), suppress(StopForward), torch.no_grad():
        run_model(model.skeleton, batch.to(model.device))
    if not entered:
        raise SourceError(f"The model never calls its first block {model.names[0]}; its architecture is not supported.")
    return entered[0]


def check_finite(hidden: Tensor, block: str) -> None:
    """Raise NumericalError naming the block whose output contains NaN or infinite values."""
    if not torch.isfinite(hidden).all():
        dtype = dtype_name(hidden.dtype)
        raise NumericalError(
            f"The output of {block} is not finite in {dtype}; use `dtype=float32`, or repair the source."
        )


def check_weights(module: nn.Module, name: str = "") -> None:
    """Raise NumericalError naming the first parameter of the module `name` that is not finite."""
    for parameter, weight in module.named_parameters(prefix=name):
        if not torch.isfinite(weight).all():
            raise NumericalError(f"{parameter} holds values that are not finite; the source checkpoint is damaged.")


def check_model_finite(model: nn.Module, samples: Tensor) -> None:
    """Raise NumericalError naming a parameter that is not finite, or else the first block whose output is not.

    model: the whole model, in memory; its blocks are the members of its module lists. samples: int64 `[batch, tokens]`.
    """
    check_weights(model)

    def check(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(first, Tensor):
                check_finite(first, name)

        return hook

    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    blocks = {name: module for name, module in model.named_modules() if name.rpartition(".")[0] in lists}
    with hooked([module.register_forward_hook(check(name)) for name, module in blocks.items()]), torch.no_grad():
        run_model(model, samples)


class RefuseNoNumbers(LogitsProcessor):
    """Refuses logits that are not finite. Otherwise NaN would produce arbitrary text in greedy decoding, or a crash."""

    def __init__(self, name: str, dtype: str) -> None:
        self._name, self._dtype = name, dtype

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # If any value is NaN, the maximum is NaN.
        largest = float(scores.max())
        if math.isnan(largest) or largest == math.inf:
            raise NumericalError(
                f"{self._name} gives logits that are not finite in {self._dtype}; try `dtype=float32`, and if that "
                "does not help, the checkpoint is damaged."
            )
        return scores
