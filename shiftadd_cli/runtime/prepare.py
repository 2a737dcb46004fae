"""Gives the layers of a loaded model the kernels that suit the machine."""

from __future__ import annotations

import logging
from collections.abc import Iterable

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
