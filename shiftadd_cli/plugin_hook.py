"""Registers our checkpoint format with transformers as soon as transformers can load checkpoints, and not earlier.

Importing transformers takes seconds, so `import shiftadd_cli` (and with it `shiftadd --help`) must not do it. If the
part of transformers that handles quantization methods is already loaded, the plugin registers at once; otherwise a
finder on `sys.meta_path` waits for that part, or for the plugin itself, and registers right after its import.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# transformers imports this package before any model class, so nothing can be loaded without it.
TARGET = "transformers.quantizers"
PLUGIN = "shiftadd_cli.runtime.transformers_plugin"


class _RegisterAfterImport(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (TARGET, PLUGIN):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run_module = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run_module(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    plugin = sys.modules.get(PLUGIN)
    if plugin is not None and not hasattr(plugin, "register"):
        # The plugin was imported first and is still importing TARGET; it is registered when its own import ends.
        return
    from shiftadd_cli.runtime.transformers_plugin import register

    register()


def install() -> None:
    """Make our checkpoints load through transformers, whichever of the two packages is imported first."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())
