"""auto-round (signed gradient descent on the rounding): https://github.com/intel/auto-round"""

from __future__ import annotations

from auto_round import AutoRound

from experiments.quality.peers import PeerJob, half_bits, set_weight
from shiftadd_cli.errors import RecipeError

# It skips other layers without an error (layer_config_resolver.py of 0.16).
_SIDE = 32


def compress(job: PeerJob) -> int:
    """See `Adapter`; with the peer's default iterations."""
    return round_by(job)


def round_by(job: PeerJob, **schedule: float) -> int:
    """Round to asymmetric grids, as in the other uniform methods here; schedule: options of its iterations."""
    windows = job.calibration_of("auto-round")
    for name, linear in job.linears():
        if linear.in_features % _SIDE or linear.out_features % _SIDE:
            raise RecipeError(f"auto-round skips {name}, because its sides are not multiples of {_SIDE}.")
    rounder = AutoRound(
        job.model,
        tokenizer=job.tokenizer,
        scheme="W4A16",
        bits=job.bits,
        group_size=job.group_size,
        sym=False,
        dataset=list(windows.split(job.batch_size)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=job.batch_size,
        seed=job.seed,
        device_map="cpu",
        enable_torch_compile=False,
        **schedule,
    )
    done, _ = rounder.quantize()
    stored = 0
    for name, linear in job.linears():
        rounded = done.get_submodule(name)
        set_weight(linear, rounded.weight.data)
        stored += job.bits * linear.weight.numel() + half_bits(rounded.scale) + job.bits * rounded.zp.numel()
    return stored
