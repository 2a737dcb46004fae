"""The head: norms, pooling, projections, factors and soft caps after the blocks, as the model's own code runs them.

The model's own forward runs with its blocks replaced by stubs that return given hidden states. In a decoder the head
acts on each token separately, so it can run on slices of tokens: logits of a large vocabulary never exist for a whole
batch. A vision model makes one prediction from all tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.blockwise.calls import PLAIN_LAYOUT, Layout
from shiftadd_cli.blockwise.forward import Prediction, predict
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.source.vision import IMAGE_INPUT


@dataclass(frozen=True)
class Form:
    """The output of a block for each sample, packed as in `blockwise.calls`.

    Attributes:
        entered, shape: `(tokens, width)` of the hidden states before and after the block.
        others: number of other values in the returned tuple; None where the block returns the hidden states bare.
    """

    entered: tuple[int, ...]
    shape: tuple[int, ...]
    others: int | None
    dtype: torch.dtype = torch.float32
    layout: Layout = PLAIN_LAYOUT

    def dress(self, hidden: Tensor) -> Any:
        """Packed hidden states `[batch, tokens, width]` in the form that the block returns."""
        states = self.layout.unpack(hidden)
        return states if self.others is None else (states, *(None,) * self.others)

    def stand_in(self, hidden: Tensor) -> Any:
        """A stub output of this form, for the hidden states `hidden` that enter the block."""
        if self.entered == self.shape:
            return self.dress(self.layout.pack(hidden))
        batch, tokens = self.layout.pack(hidden).shape[:2]
        shape = (tokens if self.entered[0] == self.shape[0] else self.shape[0], self.shape[1])
        return self.dress(torch.zeros((), dtype=self.dtype, device=hidden.device).expand(batch, *shape))


@contextmanager
def standing_in(blocks: Sequence[nn.Module], forms: Sequence[Form]) -> Iterator[None]:
    """Make the blocks compute nothing and return stub outputs of their forms, within the context."""

    def forward(form: Form) -> Callable[..., Any]:
        return lambda *args, **kwargs: form.stand_in(args[0] if args else kwargs["hidden_states"])

    with _computing(blocks, [forward(form) for form in forms]):
        yield


@contextmanager
def returning(blocks: Sequence[nn.Module], forms: Sequence[Form], hidden: Tensor) -> Iterator[None]:
    """Make the last of `blocks` return the packed `hidden` states and the others stub outputs, within the context.
    No block computes anything."""
    outputs = []
    for form in forms:
        # States of the same shape work for all blocks, even where they are a slice of the tokens.
        alike = form.shape == forms[-1].shape
        outputs.append(form.dress(hidden if alike else hidden.detach().new_zeros(()).expand(len(hidden), *form.shape)))
    with _computing(blocks, [_returning(output) for output in outputs]):
        yield


@contextmanager
def _computing(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Replace the forwards of the blocks, within the context."""
    originals = [block.__dict__.get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        block.__dict__["forward"] = forward
    try:
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            if original is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = original


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
    """Computes predictions from the hidden states of `samples` after the last block.

    Everything outside the blocks must be loaded. `forms`: output forms of all blocks, see `Trace`.

    Attributes:
        per_token: whether every token has its own prediction; otherwise every sample has one.
        classes: classes of a prediction, for memory estimates.
    """

    def __init__(self, model: BlockwiseModel, forms: Sequence[Form], samples: Tensor) -> None:
        self._model, self._samples, self._forms, self._device = model.skeleton, samples, forms, model.device
        self._blocks = [self._model.get_submodule(name) for name in model.names]
        self.per_token = self._model.main_input_name != IMAGE_INPUT
        self.classes: int = self._model.config.get_text_config().vocab_size if self.per_token else _width(self._model)

    @property
    def predictions(self) -> tuple[int, ...]:
        """The number of predictions for all samples, along each axis."""
        return tuple(self._samples.shape) if self.per_token else (len(self._samples),)

    def parts(self, samples: int, tokens: int, most: int) -> Iterator[tuple[slice, slice]]:
        """Slices of `samples` and `tokens` that can be predicted separately and together cover all, each with at most
        `most` predictions and tokens (but at least one whole sample, where a prediction uses all its tokens)."""
        if self.per_token:
            yield from slices(samples, tokens, most)
            return
        for rows, _ in slices(samples, tokens, max(most, tokens)):
            yield rows, slice(None)

    def place(self, rows: slice, tokens: slice) -> tuple[slice, ...]:
        """The index of a part's predictions among all predictions."""
        return (rows, tokens) if self.per_token else (rows,)

    def predict(self, hidden: Tensor, rows: slice, tokens: slice) -> Prediction:
        """Predictions for the hidden states `[batch, tokens, width]`, on the device, of the samples `rows`."""
        with returning(self._blocks, self._forms, hidden):
            # The samples only provide shapes to the code that calls the stubs.
            return predict(self._model, self._samples[self.place(rows, tokens)].to(self._device))


def _width(model: Any) -> int:
    """The number of class scores of a vision model, or an upper limit on its features."""
    sizes = [getattr(model.config, name, None) or 0 for name in ("num_labels", "hidden_size", "projection_dim")]
    return max(1, *sizes)
