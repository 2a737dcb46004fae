"""Post-training compression of language models and vision transformers into binary matrices with power-of-two scales.

Importing this package is cheap, and enables transformers to load our checkpoints:

    import shiftadd_cli
    model = transformers.AutoModelForCausalLM.from_pretrained("OUT")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shiftadd_cli import plugin_hook
from shiftadd_cli.version import __version__

if TYPE_CHECKING:
    from shiftadd_cli.allocation.plan_file import BitPlan
    from shiftadd_cli.api import allocate_bits, evaluate, generate, linearize, load, quantize
    from shiftadd_cli.errors import ShiftaddError
    from shiftadd_cli.recipe import Recipe

# Public names and their modules. They are imported on first use, since most of them need torch.
_API = {
    "BitPlan": "shiftadd_cli.allocation.plan_file",
    "Recipe": "shiftadd_cli.recipe",
    "ShiftaddError": "shiftadd_cli.errors",
    "allocate_bits": "shiftadd_cli.api",
    "evaluate": "shiftadd_cli.api",
    "generate": "shiftadd_cli.api",
    "linearize": "shiftadd_cli.api",
    "load": "shiftadd_cli.api",
    "quantize": "shiftadd_cli.api",
}

__all__ = [
    "BitPlan",
    "Recipe",
    "ShiftaddError",
    "__version__",
    "allocate_bits",
    "evaluate",
    "generate",
    "linearize",
    "load",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(import_module(_API[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_API])


plugin_hook.install()
