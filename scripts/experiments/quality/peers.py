"""Third-party quantizers to compare with: the requirements of each, and the interface of an adapter."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shiftadd_cli.errors import RecipeError

# The fields that a peer takes from a recipe; every other field describes our own solver.
PEER_FIELDS = frozenset({"group_size", "calibration", "samples", "seq_len", "seed"})


@dataclass(frozen=True)
class PeerJob:
    """The job of an adapter.

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
        """The windows. Raises RecipeError, with the peer's usual name, if there are none."""
        if self.windows is None:
            raise RecipeError(f"{peer} needs calibration text.")
        return self.windows

    def linears(self) -> list[tuple[str, nn.Linear]]:
        """Name and module of each linear to compress."""
        linears = [(name, self.model.get_submodule(name)) for name in self.names]
        if any(not isinstance(module, nn.Linear) for _, module in linears):
            raise RecipeError("Peers take models of plain linear layers only; leave them out for this model.")
        return linears


class Adapter(Protocol):
    """A module `peers_NAME`, with `_` for `-`. `compress` replaces the weights of the linears by the decoded weights of
    the peer, in place.

    It returns the bits that the peer would store for these layers, including scales and zero points. It raises
    RecipeError for a job that the peer cannot do.
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
        """Raise RecipeError with the fix if the package is missing."""
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            raise RecipeError(
                f"The peer {self.name!r} needs the package {self.package}, which is not installed; "
                f"pip install {self.package}, or most peers by pip install '.[peers]'."
            )

    def adapter(self) -> Adapter:
        """The adapter, imported only now because the import of its package may take long."""
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
    """Bits of tensors that a checkpoint would hold in half precision, whatever their dtype here."""
    return sum(16 * tensor.numel() for tensor in tensors)


def set_weight(linear: nn.Linear, decoded: Tensor) -> None:
    """Set the weight of a linear to the decoded one, in the dtype that it had."""
    with torch.no_grad():
        linear.weight.copy_(decoded.reshape(linear.weight.shape))
