"""A layer of transformers' cache that holds the sinks, the nearest tokens and a linear state of all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from shiftadd_cli.errors import LinearAttentionError
from shiftadd_cli.runtime.linear_attention.attention import Reach, State, attend, tokens_within
from shiftadd_cli.runtime.linear_attention.feature_maps import FeatureMap

# Tokens kept beyond the window, so that so many can be taken back: a rejected draft has at most seven.
MARGIN = 16
# Tokens are moved to the state so many at a time, and prompts are read so many at a time.
_FOLD, _CHUNK = 64, 256


class LinearLayer(DynamicLayer):
    """The cache of one attention layer. Its size does not depend on the number of tokens.

    `keys` and `values` are those of the nearest tokens, `[rows, kv_heads, tokens, size]`. Call `update` with new
    tokens, and then `attend` with their queries.
    """

    # Set by `lazy_initialization`.
    keys: Tensor
    values: Tensor
    sink_keys: Tensor
    sink_values: Tensor
    state: State

    def __init__(self, feature_map: FeatureMap, reach: Reach) -> None:
        super().__init__()
        self.feature_map, self.reach = feature_map, reach
        # The number of tokens of a text, and of those that have left `keys`.
        self.seen, self.folded = 0, 0
        # The position of the first token that is not padding, `[rows]`, once it is known.
        self.first: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, kv_heads, _, size = key_states.shape
        self.keys = key_states[:, :, :0]
        self.values = value_states[:, :, :0]
        self.sink_keys = key_states.new_zeros(rows, kv_heads, self.reach.sinks, size)
        self.sink_values = value_states.new_zeros(rows, kv_heads, self.reach.sinks, value_states.shape[-1])
        self.state = State.zeros(rows, kv_heads, self.feature_map.features, value_states.shape[-1], self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.seen += key_states.shape[2]
        return keys, values

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Outputs `[rows, heads, tokens, size]`, float32, of the queries `[rows, heads, tokens, size]` of the tokens
        that `update` has added last.

        mask: as transformers gives it to an attention function, `[rows, 1, tokens, all tokens]`, bool or added to the
        scores; None for causal attention without padding.

        Raises LinearAttentionError if the mask hides other tokens than padding at the beginning.
        """
        new = query.shape[2]
        self.first = first = self._first_tokens(mask, new, query.device)
        start = self.seen - new
        outputs = []
        for position in range(start, self.seen, _CHUNK):
            chunk = query[:, :, position - start : position - start + _CHUNK]
            self._fold(position - self.reach.window + 1 - MARGIN, first)
            outputs.append(self._attend_chunk(chunk, position, first, scaling))
        return torch.cat(outputs, 2)

    def _attend_chunk(self, query: Tensor, position: int, first: Tensor, scaling: float) -> Tensor:
        """position: of the first of these queries."""
        rows, device = query.shape[0], query.device
        end = position + query.shape[2]
        own = slice(0, end - self.folded)
        keys = torch.arange(self.folded, end, device=device).expand(rows, -1)
        # A sink that is still among the nearest tokens is no sink yet: it gets a position before all texts.
        sinks = first[:, None] + torch.arange(self.reach.sinks, device=device)
        sinks = torch.where(sinks < self.folded, sinks, -1)
        near, distant = tokens_within(
            self.reach, torch.arange(position, end, device=device), torch.cat([sinks, keys], 1), first
        )
        return attend(
            query,
            torch.cat([self.sink_keys, self.keys[:, :, own]], 2),
            torch.cat([self.sink_values, self.values[:, :, own]], 2),
            near,
            distant,
            self.feature_map,
            scaling,
            self.state if self.folded else None,
        )

    def _fold(self, end: int, first: Tensor) -> None:
        """Move the tokens before position `end` from `keys` to the sinks and the state, if they are enough."""
        count = end - self.folded
        if count < _FOLD:
            return
        keys, values = self.keys[:, :, :count], self.values[:, :, :count]
        positions = torch.arange(self.folded, end, device=keys.device)
        distant = positions >= (first + self.reach.sinks)[:, None]
        self.state.add(self.feature_map.keys(keys) * distant[:, None, :, None], values)
        self._keep_sinks(keys, values, end, first)
        self.keys, self.values = self.keys[:, :, count:], self.values[:, :, count:]
        self.folded = end

    def _keep_sinks(self, keys: Tensor, values: Tensor, end: int, first: Tensor) -> None:
        sinks = first[:, None] + torch.arange(self.reach.sinks, device=keys.device)
        leaves = ((sinks >= self.folded) & (sinks < end))[:, None, :, None]
        index = (sinks - self.folded).clamp(0, end - self.folded - 1)[:, None, :, None]

        def picked(tensor: Tensor) -> Tensor:
            return tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))

        self.sink_keys = torch.where(leaves, picked(keys), self.sink_keys)
        self.sink_values = torch.where(leaves, picked(values), self.sink_values)

    def _first_tokens(self, mask: Tensor | None, new: int, device: torch.device) -> Tensor:
        """Positions `[rows]` at which texts begin. Refuses masks that the state cannot express."""
        rows = self.keys.shape[0]
        if mask is None:
            return torch.zeros(rows, dtype=torch.long, device=device) if self.first is None else self.first
        if mask.shape[-2:] != (new, self.seen):
            raise LinearAttentionError(
                f"A mask of {tuple(mask.shape)} does not fit {new} new of {self.seen} tokens in linear attention; call "
                "the model with a cache that `DynamicCache` makes, and all masks with it."
            )
        seen_by = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(rows, -1, -1)
        positions = torch.arange(self.seen, device=device)
        queries = positions[-new:]
        # A token that does not see itself is padding.
        real = seen_by[:, range(new), queries]
        begins = torch.where(seen_by, positions, self.seen).amin(-1)
        first = torch.where(real, begins, self.seen).amin(-1)
        if self.first is not None:
            # A row that was all padding so far begins now.
            first = torch.where(self.first < self.seen - new, self.first, first)
        expected = (positions >= first[:, None, None]) & (positions <= queries[None, :, None])
        if not torch.equal(seen_by & real[..., None], expected & real[..., None]):
            raise LinearAttentionError(
                "This mask hides more than padding on the left, which linear attention cannot; pad batches on the left "
                "and leave out packed texts."
            )
        return first

    def get_seq_length(self) -> int:
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end, given by a negative number as transformers does.

        Raises:
            LinearAttentionError: they are more than are still kept apart from the state.
            ValueError: the number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        count = -tokens_to_remove
        if count == 0 or not self.is_initialized:
            return
        if self.folded and self.seen - count - self.folded < self.reach.window - 1:
            raise LinearAttentionError(
                f"Linear attention can take back {MARGIN} tokens, not {count}, since older ones are summed up; read "
                "the text again with a new cache."
            )
        self.keys, self.values = self.keys[:, :, :-count], self.values[:, :, :-count]
        self.seen -= count

    def reset(self) -> None:
        self.seen, self.folded = 0, 0
        self.first = None
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda tensor: tensor[indices])

    def _change(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, whose first dimension is the rows of the batch."""
        if not self.is_initialized:
            return
        self.keys, self.values = rows(self.keys), rows(self.values)
        self.sink_keys, self.sink_values = rows(self.sink_keys), rows(self.sink_values)
        self.state = State(rows(self.state.values), rows(self.state.weights))
        self.first = None if self.first is None else rows(self.first)
