"""Gives the layers of a loaded model the kernels that suit the machine, and detaches the model from its files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from shiftadd_cli.kernels.select import Kernel, chosen_kernel
from shiftadd_cli.native.extension import cpu_extension
from shiftadd_cli.runtime.packed import PackedWeight

_log = logging.getLogger(__name__)
_NO_KERNELS = (
    "shiftadd was installed without its compiled kernels (no C++ compiler was found): compressed layers are decoded on "
    "every call, which is slow. Install g++ or clang, then shiftadd again."
)
_said: set[str] = set()


def prepare_layers(layers: Iterable[PackedWeight]) -> None:
    """Prepare all layers except those that a hook moves between devices (offloading). Raises RuntimeChoiceError."""
    resident = [layer for layer in layers if not hasattr(layer, "_hf_hook")]
    on_cpu = any(layer.get_parameter("weight_codes").device.type == "cpu" for layer in resident)
    if on_cpu and chosen_kernel() is Kernel.AUTO and cpu_extension() is None and _NO_KERNELS not in _said:
        _said.add(_NO_KERNELS)
        _log.warning(_NO_KERNELS)
    for layer in resident:
        # A tied layer may be prepared already.
        if layer.kernel is None:
            layer.prepare()


def detach_from_files(model: nn.Module, files: Sequence[str]) -> None:
    """Copy the tensors that a model on the CPU still reads from its mapped files, unless these are mostly read.

    A mapped file stays in memory as long as one tensor reads it, beside the planes that were rearranged. Where a model
    reads most of a file, as with dense weights, the mapping costs nothing and stays.
    """
    packed = [layer for layer in model.modules() if isinstance(layer, PackedWeight) and layer.kernel is Kernel.CPU]
    rearranged = {id(tensor) for layer in packed for tensor in layer.on_cpu().tensors().values()}
    parameters = [tensor for tensor in model.parameters() if tensor.device.type == "cpu"]
    buffers = [tensor for tensor in model.buffers() if tensor.device.type == "cpu" and id(tensor) not in rearranged]
    read = sum(tensor.nbytes for tensor in (*parameters, *buffers))
    if 2 * read >= sum(Path(file).stat().st_size for file in files):
        return
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    # By identity, because tied modules share them.
    copies = {id(tensor): tensor.clone() for tensor in buffers}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # A loaded buffer is a view of the file even after its data are replaced, so the copy takes its place.
            module._buffers[name] = copies.get(id(buffer), buffer)
