"""HQQ (half-quadratic quantization, no data): https://github.com/mobiusml/hqq"""

from __future__ import annotations

from hqq.core.quantize import Quantizer

from experiments.quality.peers import PeerJob, half_bits, set_weight
from shiftadd_cli.errors import RecipeError


def compress(job: PeerJob) -> int:
    """See `Adapter`. Groups run along the inputs (axis 1), as in every other method here."""
    stored = 0
    for name, linear in job.linears():
        weight = linear.weight.data
        if weight.numel() % job.group_size:
            raise RecipeError(f"HQQ cannot cut {name}, of {weight.numel()} weights, into groups of {job.group_size}.")
        if job.bits not in Quantizer.SUPPORTED_BITS:
            raise RecipeError(f"HQQ has no weights of {job.bits} bits.")
        packed, meta = Quantizer.quantize(
            weight.float(), nbits=job.bits, group_size=job.group_size, axis=1, device="cpu"
        )
        set_weight(linear, Quantizer.dequantize(packed, meta))
        # HQQ packs ten 3-bit weights into an int32; this counts only the bits themselves, as for all methods.
        stored += job.bits * weight.numel() + half_bits(meta["scale"], meta["zero"])
    return stored
