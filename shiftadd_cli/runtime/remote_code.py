"""A file in a checkpoint folder that imports this package, for programs that only set `trust_remote_code=True`.

transformers loads the configuration class from it. This is the original class under its own name, by which transformers
finds the model. Without this package the file's import fails, and transformers names the package to install.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODULE = "configuration_shiftadd"
CODE_FILE = f"{MODULE}.py"

_TEXT = '''"""Lets transformers read this checkpoint with trust_remote_code=True; needs `pip install shiftadd-cli`."""

import shiftadd_cli  # noqa: F401 - registers the format with transformers
from transformers import {name} as Original


class {name}(Original):
    """The configuration of the original; its name is how transformers finds the model."""
'''


def code_entry(config: Any) -> dict[str, Any]:
    """The file's entry in config.json; empty if the model brings its own code, or is not one of transformers'."""
    import transformers

    kind = type(config)
    if getattr(config, "auto_map", None) or getattr(transformers, kind.__name__, None) is not kind:
        return {}
    return {"auto_map": {"AutoConfig": f"{MODULE}.{kind.__name__}"}}


def code_files(config: Any) -> dict[str, str]:
    """The file's text by its name; empty where `code_entry` is."""
    return {CODE_FILE: _TEXT.format(name=type(config).__name__)} if code_entry(config) else {}


def brings_code(config: Mapping[str, Any]) -> bool:
    """Whether a config.json names the model's own code, in addition to our file."""
    entries = config.get("auto_map")
    names = entries.values() if isinstance(entries, Mapping) else ()
    return any(not str(name).startswith(f"{MODULE}.") for name in names)


def forget_unused_entry(config: Any) -> None:
    """Drop the entry from the configuration of a model loaded without the file, because `save_pretrained` does not copy
    the file then."""
    reference = (getattr(config, "auto_map", None) or {}).get("AutoConfig", "")
    if reference.startswith(f"{MODULE}.") and not type(config).__module__.endswith(MODULE):
        del config.auto_map
