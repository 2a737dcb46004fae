"""Several processes, on one machine or more, that quantize one model together."""

from shiftadd_cli.distributed.shards import Shards
from shiftadd_cli.distributed.team import Team

__all__ = ["Shards", "Team"]
