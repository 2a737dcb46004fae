"""Other people's quantizers that can be compared with: what each needs, and what an adapter is."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shiftadd_cli.errors import RecipeError

# What a peer takes from a recipe; every other field describes our own solver.
PEER_FIELDS = frozenset({"group_size", "calibration", "samples", "seq_len", "seed"})


@dataclass(frozen=True)
class PeerJob:
    """What an adapter is asked for.

    Attributes:
        model, tokenizer: the original, in memory in evaluation mode; `names` are the linears to compress.
        windows: the calibration windows of our own recipes, int64 `[samples, seq_len]`; None for data-free peers.
        bits, group_size: of the weights; batch_size and seed as in a recipe.
    """

    model: Any
    tokenizer: Any
    names: Sequence[str]
    windows: Tensor | None
    bits: int
    group_size: int
    batch_size: int
    seed: int

    def calibration_of(self, peer: str) -> Tensor:
        """The windows. Raises RecipeError, naming the peer as its readers know it, where there are none."""
        if self.windows is None:
            raise RecipeError(f"{peer} needs calibration text.")
        return self.windows

    def linears(self) -> list[tuple[str, nn.Linear]]:
        """Name and module of each linear to compress."""
        found = [(name, self.model.get_submodule(name)) for name in self.names]
        if any(not isinstance(module, nn.Linear) for _, module in found):
            raise RecipeError("Peers take models of plain linear layers only; leave them out for this model.")
        return found


class Adapter(Protocol):
    """A module `peers_NAME`, `-` as `_`: replaces the weights of the linears by what the peer decodes, in place.

    `compress` returns the bits it would store for these layers, scales and zero points counted; it raises RecipeError
    for what the peer cannot do.
    """

    def compress(self, job: PeerJob) -> int: ...


@dataclass(frozen=True)
class Peer:
    """A peer: `package` as pip knows it, `module` as Python imports it, and whether it reads calibration text."""

    name: str
    package: str
    module: str
    calibrated: bool

    def require(self) -> None:
        """Raise RecipeError with the cure where the package is absent."""
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            raise RecipeError(
                f"The peer {self.name!r} needs the package {self.package}, which is not installed; "
                f"pip install {self.package}, or most peers by pip install '.[peers]'."
            )

    def adapter(self) -> Adapter:
        """The adapter, imported now because its package may take long to come."""
        adapter: Any = importlib.import_module(f"experiments.quality.peers_{self.name.replace('-', '_')}")
        return adapter


PEERS = {
    peer.name: peer
    for peer in (
        Peer("autoround", "auto-round", "auto_round", calibrated=True),
        Peer("autoround-light", "auto-round", "auto_round", calibrated=True),
        Peer("gptqmodel", "gptqmodel", "gptqmodel", calibrated=True),
        Peer("hqq", "hqq", "hqq.core", calibrated=False),
        Peer("quanto", "optimum-quanto", "optimum.quanto", calibrated=False),
    )
}


def half_bits(*tensors: Tensor) -> int:
    """Bits of tensors that a checkpoint would hold in half precision, whatever they were computed in."""
    return sum(16 * each.numel() for each in tensors)


def set_weight(linear: nn.Linear, decoded: Tensor) -> None:
    """Give a linear the decoded weight, in the dtype it had."""
    with torch.no_grad():
        linear.weight.copy_(decoded.reshape(linear.weight.shape))
