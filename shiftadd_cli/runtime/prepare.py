"""Giving the layers of a loaded model the kernels that suit the machine."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from shiftadd_cli.runtime.kernels.choice import Kernel, chosen_kernel, chosen_precision
from shiftadd_cli.runtime.kernels.cpu_weight import supports
from shiftadd_cli.runtime.kernels.extension import cpu_extension
from shiftadd_cli.runtime.linear import PackedLinear

_log = logging.getLogger(__name__)


def prepare_layers(layers: Iterable[PackedLinear]) -> None:
    """Prepare the layers on the CPU, unless the environment asks for something else, see `kernels.choice`.

    Layers that a hook moves about (offloading) stay as they are. Raises RuntimeChoiceError.
    """
    kernel, precision = chosen_kernel(), chosen_precision()
    if kernel not in (Kernel.AUTO, Kernel.CPU):
        return
    mine = [each for each in layers if each.get_parameter("weight_codes").device.type == "cpu" and not _hooked(each)]
    if cpu_extension() is None:
        if mine:
            _say_once(
                "shiftadd was installed without its compiled kernels (no C++ compiler was found): compressed layers "
                "are decoded on every call, which is slow. Install g++ or clang, then shiftadd again."
            )
        return
    for layer in mine:
        if supports(layer.layout):
            layer.prepare(precision)


def _hooked(layer: PackedLinear) -> bool:
    return hasattr(layer, "_hf_hook")


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.warning(message)
