"""auto-round with its own recipe `light`: a quarter of the iterations, in longer steps."""

from __future__ import annotations

from experiments.quality.peers import PeerJob
from experiments.quality.peers_autoround import round_by


def compress(job: PeerJob) -> int:
    """See `Adapter`; the schedule of `RECIPES` in the peer's cli/main.py (0.16)."""
    return round_by(job, iters=50, lr=5e-3)
