"""Trellis codes: more computed planes than stored bits.

A row stores k bits of a weight. Its register holds these and the stored bits of the rows above it in the same column:
bits 0 to k - 1 are this row's, bits k to 2k - 1 those of the row above, and so on. Plane b of the weight is the parity
of the register bits in mask b. The register starts with zeros at the first row of every stripe. The m > k planes select
one of 2^m levels, so k bits choose among paths through 2^m levels (trellis-coded quantization: Marcellin and Fischer
1990; for weights of language models QTIP, arXiv:2406.11235).

    register of row r   u[r] | u[r - 1] << k | u[r - 2] << 2k | ...        (memory + k bits)
    plane b of row r    parity(register & mask[b])

`encode` finds the stored bits with the least squared error by the Viterbi algorithm (Viterbi 1967).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shiftadd_cli.bcq.grid import Rows, numbers_of


@dataclass(frozen=True)
class TrellisCode:
    """A code with `bits` stored bits per weight, 2^`memory` states, and one mask per computed plane.

    Raises ValueError for masks that do not fit the register.
    """

    bits: int
    memory: int
    masks: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.bits < 1 or self.memory < self.bits:
            raise ValueError(f"a code of {self.bits} bits needs at least {self.bits} bits of memory")
        if not all(0 < mask < 1 << (self.memory + self.bits) for mask in self.masks):
            raise ValueError(f"the masks of a register of {self.memory + self.bits} bits are between 1 and 2^bits - 1")

    @property
    def planes(self) -> int:
        """Number of computed planes, m."""
        return len(self.masks)

    @property
    def states(self) -> int:
        return 1 << self.memory

    @property
    def taps(self) -> int:
        """Number of register bits that all planes read together, a measure of the decoding time."""
        return sum(mask.bit_count() for mask in self.masks)

    @property
    def height(self) -> int:
        """Number of rows whose stored bits are in a register, at least in part."""
        return -(-(self.memory + self.bits) // self.bits)

    @property
    def has_kernel(self) -> bool:
        """Whether the compiled kernels encode it: with 64 states, 1 to 4 bits and at most 6 planes."""
        return self.memory == 6 and self.bits <= 4 and self.planes <= 6

    @cached_property
    def labels(self) -> Tensor:
        """The level that every branch selects, int64 `[2^bits, states]`: `labels[j, s]` for the branch into state `s`
        from its predecessor number j, see `predecessors`."""
        branches = torch.arange(1 << self.bits).unsqueeze(1)
        states = torch.arange(self.states)
        return self._labels_of(branches << self.memory | states)

    @cached_property
    def predecessors(self) -> Tensor:
        """int64 `[2^bits, states]`: the states from which a branch leads into each state."""
        branches = torch.arange(1 << self.bits).unsqueeze(1)
        return torch.arange(self.states) >> self.bits | branches << (self.memory - self.bits)

    def selected(self, stored: Tensor, stripe: int) -> Tensor:
        """The levels that stored bits select, int64 `[rows, ...]` for `stored` `[rows, ...]` of integers below 2^bits.

        stripe: rows after which the register starts again.
        """
        codes = stored.long()
        register = codes.clone()
        rows = torch.arange(len(codes)).view(-1, *[1] * (codes.ndim - 1)) % stripe
        for distance in range(1, min(len(codes), self.height)):
            above = torch.zeros_like(codes)
            above[distance:] = codes[: len(codes) - distance]
            register |= torch.where(rows >= distance, above, 0) << (self.bits * distance)
        return self._labels_of(register)

    def _labels_of(self, registers: Tensor) -> Tensor:
        """The levels that registers select, integers of the same shape."""
        labels = torch.zeros_like(registers)
        for plane, mask in enumerate(self.masks):
            labels |= _parity(registers & mask) << plane
        return labels

    def packed_planes(self, stored: Tensor, rows: Rows, stripe: int) -> Tensor:
        """The computed planes of some rows, uint8 `[rows, m, bytes]`, from packed stored bits uint8 `[out, k, bytes]`.

        Exclusive-or works on all columns of a byte at once.
        """
        numbers = numbers_of(rows, stored.device)
        above = []
        for distance in range(self.height):
            inside = (numbers % stripe >= distance).to(torch.uint8).view(-1, 1, 1)
            above.append(stored[(numbers - distance).clamp_min(0)] * inside)
        planes = stored.new_zeros(len(numbers), self.planes, stored.shape[-1])
        for plane, mask in enumerate(self.masks):
            for tap in range(self.memory + self.bits):
                if mask >> tap & 1:
                    planes[:, plane] ^= above[tap // self.bits][:, tap % self.bits]
        return planes

    def encode(self, goals: Tensor, levels: Tensor, stripe: int) -> tuple[Tensor, Tensor]:
        """The stored bits uint8 `[rows, ...]` and levels `[rows, ...]` with the least Σ (goal - level)².

        goals: float `[rows, ...]`, independent sequences along the first axis. levels: float `[rows, ..., 2^m]`, where
        the axes between may be 1. Exact up to rounding of the sums; of equal paths, the one with the lowest branches.
        """
        stored = torch.empty(goals.shape, dtype=torch.uint8, device=goals.device)
        values = torch.empty_like(goals)
        for start in range(0, len(goals), stripe):
            rows = slice(start, start + stripe)
            stored[rows], values[rows] = self._encode_stripe(goals[rows], levels[rows])
        return stored, values

    def _encode_stripe(self, goals: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        labels, predecessors = self.labels.to(goals.device), self.predecessors.to(goals.device)
        cost = goals.new_full((*goals.shape[1:], self.states), torch.inf)
        cost[..., 0] = 0
        branches = []
        for goal, choices in zip(goals, levels, strict=True):
            errors = (goal.unsqueeze(-1) - choices) ** 2
            cost, branch = _first_least(cost[..., predecessors] + errors[..., labels])
            branches.append(branch)
        state = cost.argmin(-1, keepdim=True)
        stored = torch.empty(goals.shape, dtype=torch.uint8, device=goals.device)
        values = torch.empty_like(goals)
        for row in reversed(range(len(goals))):
            branch = branches[row].gather(-1, state).long()
            label = labels[branch, state]
            stored[row] = (state & ((1 << self.bits) - 1)).squeeze(-1)
            values[row] = levels[row].expand(*goals.shape[1:], -1).gather(-1, label).squeeze(-1)
            state = predecessors[branch, state]
        return stored, values


def _first_least(costs: Tensor) -> tuple[Tensor, Tensor]:
    """The least of `costs` `[..., branches, states]` over branches and, as uint8, the first branch that has it."""
    best, branch = costs[..., 0, :], torch.zeros_like(costs[..., 0, :], dtype=torch.uint8)
    for number in range(1, costs.shape[-2]):
        better = costs[..., number, :] < best
        best = torch.where(better, costs[..., number, :], best)
        branch.masked_fill_(better, number)
    return best, branch


def _parity(numbers: Tensor) -> Tensor:
    """The parity of the set bits of nonnegative integers."""
    for shift in (16, 8, 4, 2, 1):
        numbers = numbers ^ numbers >> shift
    return numbers & 1
