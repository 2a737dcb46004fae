"""optimum-quanto (round to nearest on the min-max grid, no data): https://github.com/huggingface/optimum-quanto"""

from __future__ import annotations

from optimum.quanto import MaxOptimizer, qtypes, quantize_weight

from experiments.quality.peers import PeerJob, half_bits, set_weight
from shiftadd_cli.errors import RecipeError


def compress(job: PeerJob) -> int:
    """See `Adapter`."""
    kind = qtypes.get(f"qint{job.bits}")
    if kind is None or job.bits == 8:
        raise RecipeError(f"Quanto has no grouped weights of {job.bits} bits.")
    stored = 0
    for _, linear in job.linears():
        weight = linear.weight.data.float()
        # Quanto itself falls back to one group per row if the groups do not divide the columns.
        size = None if weight.shape[1] % job.group_size else job.group_size
        scale, shift = MaxOptimizer()(weight, kind, 0, size)
        packed = quantize_weight(weight, kind, axis=0, scale=scale, shift=shift, group_size=size, optimized=False)
        set_weight(linear, packed.dequantize())
        stored += job.bits * weight.numel() + half_bits(scale, shift)
    return stored
