"""What surrounds a computation without changing its result."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shiftadd_cli.device import choose_device
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.progress import BlockProgress, block_bar, silent


@dataclass(frozen=True)
class Context:
    """The device that a run computes on, the processes that share its work, and the display of its progress."""

    device: torch.device
    team: Team = ALONE
    progress: BlockProgress = silent

    @classmethod
    def of(cls, device: str, team: Team = ALONE) -> Context:
        """The context of a command: `device` as in a recipe; the first process of `team` shows the progress."""
        return cls(choose_device(device), team, block_bar if team.first else silent)


ALONE_ON_CPU = Context(torch.device("cpu"))
