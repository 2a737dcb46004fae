"""What comes after the blocks (norms, pooling, projections, head, factors, soft caps), as the model's own code runs it.

The model's own forward runs with its blocks replaced by stubs that return given hidden states. In a decoder all that
comes after them acts on each token by itself, so it may run on slices of tokens: logits of a large vocabulary never
exist for a whole batch. A vision model has one prediction for all tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shiftadd_cli.source import Structure
from shiftadd_cli.source.vision import IMAGE_INPUT

# What a model without class scores gives for an image, best first; without any the mean of its last hidden states.
_FEATURES = ("image_embeds", "pooler_output")


def run_model(model: Any, samples: Tensor) -> Any:
    """The model's own forward on int64 tokens `[batch, seq_len]`, or on pixels `[batch, channels, height, width]`, cast
    to its dtype."""
    if model.main_input_name == IMAGE_INPUT:
        return model(**{IMAGE_INPUT: samples.to(model.dtype)})
    return model(input_ids=samples, use_cache=False)


class Prediction(NamedTuple):
    """What a model says of its samples: `values` are logits `[..., classes]`, or, of a vision model without a head,
    features `[batch, width]`."""

    values: Tensor
    is_logits: bool


def predict(model: Any, samples: Tensor) -> Prediction:
    """Logits, or features where the model has no head, see `run_model` and `_FEATURES`."""
    output = run_model(model, samples)
    if (logits := getattr(output, "logits", None)) is not None:
        return Prediction(logits, True)
    for name in _FEATURES:
        if (found := getattr(output, name, None)) is not None:
            return Prediction(found, False)
    return Prediction(output.last_hidden_state.mean(1), False)


def hidden_of(output: Any) -> Tensor:
    """Blocks return hidden states bare or as the first of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


@dataclass(frozen=True)
class Form:
    """What a block gives out: hidden states of `shape` `[tokens, width]` for each sample, bare, or the first of a tuple
    of so many `others` beside them."""

    shape: tuple[int, ...]
    others: int | None

    @classmethod
    def of(cls, output: Any) -> Form:
        """The form of a block's output."""
        others = len(output) - 1 if isinstance(output, (tuple, list)) else None
        return cls(tuple(hidden_of(output).shape[1:]), others)

    def dress(self, hidden: Tensor) -> Any:
        """Hidden states as a block of this form returns them."""
        return hidden if self.others is None else (hidden, *(None,) * self.others)


@contextmanager
def returning(blocks: Sequence[nn.Module], forms: Sequence[Form], hidden: Tensor) -> Iterator[None]:
    """While this lasts, the last of `blocks` does nothing and returns `hidden`, the others something of their form."""
    for block, form in zip(blocks, forms, strict=True):
        # Of the same shape the states themselves will do, also where they are a slice of the tokens.
        alike = form.shape == forms[-1].shape
        states = hidden if alike else hidden.detach().new_zeros(()).expand(len(hidden), *form.shape)
        block.__dict__["forward"] = _returning(form.dress(states))
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


def slices(windows: int, tokens: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles of windows and tokens that cover `windows` x `tokens`, each of at most `most` (at least 1) tokens."""
    step = min(tokens, most)
    group = max(1, most // tokens)
    for top in range(0, windows, group):
        for left in range(0, tokens, step):
            yield slice(top, min(top + group, windows)), slice(left, min(left + step, tokens))


class Head:
    """From the hidden states behind the last block of `samples` to predictions.

    Everything outside the blocks must be materialised on `device`. `forms`: of all blocks, see `Trace`.

    Attributes:
        per_token: whether every token has a prediction of its own; else every sample.
        classes: of a prediction, for what memory it takes.
    """

    def __init__(
        self, model: Any, structure: Structure, forms: Sequence[Form], samples: Tensor, device: torch.device
    ) -> None:
        self._model, self._samples, self._forms, self._device = model, samples, forms, device
        self._blocks = [model.get_submodule(name) for name in structure.blocks]
        self.per_token = model.main_input_name != IMAGE_INPUT
        self.classes: int = model.config.get_text_config().vocab_size if self.per_token else _width(model)

    @property
    def predictions(self) -> tuple[int, ...]:
        """How many predictions there are for all samples, along each axis."""
        return tuple(self._samples.shape) if self.per_token else (len(self._samples),)

    def parts(self, samples: int, tokens: int, most: int) -> Iterator[tuple[slice, slice]]:
        """Slices of samples and tokens that can be predicted by themselves and cover so many, each with at most `most`
        predictions and tokens (one whole sample at least, where a prediction is made of all its tokens)."""
        if self.per_token:
            yield from slices(samples, tokens, most)
            return
        for rows, _ in slices(samples, tokens, max(most, tokens)):
            yield rows, slice(None)

    def place(self, rows: slice, tokens: slice) -> tuple[slice, ...]:
        """Where the predictions of a part lie among all."""
        return (rows, tokens) if self.per_token else (rows,)

    def predict(self, hidden: Tensor, rows: slice, tokens: slice) -> Prediction:
        """Predictions for `hidden` `[batch, tokens, width]`, on the device, which belong to the samples `rows`."""
        with returning(self._blocks, self._forms, hidden):
            # The samples only give the stubs' callers their shapes.
            return predict(self._model, self._samples[self.place(rows, tokens)].to(self._device))


def _width(model: Any) -> int:
    """Class scores of a vision model, or a bound on its features."""
    sizes = [getattr(model.config, name, None) or 0 for name in ("num_labels", "hidden_size", "projection_dim")]
    return max(1, *sizes)
