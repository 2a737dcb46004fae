"""GPTQModel (GPTQ by columns, groups in the order of their activations): https://github.com/ModelCloud/GPTQModel"""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

from experiments.quality.peers import PeerJob, half_bits, set_weight
from shiftadd_cli.errors import RecipeError

# Its packing takes only full words of 32 values (nn_modules/qlinear/__init__.py of 7.7).
_SIDE = 32


def compress(job: PeerJob) -> int:
    """See `Adapter`; with the peer's default order of columns, which needs no permutation at run time, and with
    asymmetric grids, as in the other uniform methods here."""
    windows = job.calibration_of("GPTQModel")
    for name, linear in job.linears():
        if linear.out_features % _SIDE or linear.in_features % _SIDE or linear.in_features % job.group_size:
            raise RecipeError(
                f"GPTQModel cannot take {name} of {linear.out_features} x {linear.in_features} in groups of "
                f"{job.group_size}: sides must be multiples of {_SIDE}, and columns also of the group."
            )
    # On two cores it defaults to one worker, which is too few for its own loader.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    # In the older `gptq` file format, zero points are off by one until a model is loaded again.
    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=False,
        format="gptq_v2",
        device="cpu",
        offload_to_disk=False,
    )
    with TemporaryDirectory() as folder:
        job.model.save_pretrained(folder)
        job.tokenizer.save_pretrained(folder)
        # The decoded weights go into our model; the peer reads its own copy from the folder.
        peer = GPTQModel.load(folder, config, backend=BACKEND.TORCH)
        samples = [{"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in windows]
        peer.quantize(samples, batch_size=job.batch_size, calibration_sort=None, tokenizer=job.tokenizer)
    stored = 0
    for name, linear in job.linears():
        packed = peer.model.get_submodule(name)
        set_weight(linear, packed.dequantize_weight().T)
        stored += job.bits * (linear.weight.numel() + packed.scales.numel()) + half_bits(packed.scales)
    return stored
