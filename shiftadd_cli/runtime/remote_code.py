"""A file in a checkpoint's folder that imports this package, for programs that only know `trust_remote_code=True`.

transformers loads the configuration's class from it, which is the original one under its own name: models are found by
that name. Without this package the file's import fails, and transformers says what to install.
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
    """What config.json says of the file; empty where the model brings code of its own, or is none of transformers'."""
    import transformers

    kind = type(config)
    if getattr(config, "auto_map", None) or getattr(transformers, kind.__name__, None) is not kind:
        return {}
    return {"auto_map": {"AutoConfig": f"{MODULE}.{kind.__name__}"}}


def code_files(config: Any) -> dict[str, str]:
    """The file's text by its name; empty where `code_entry` is."""
    return {CODE_FILE: _TEXT.format(name=type(config).__name__)} if code_entry(config) else {}


def brings_code(config: Mapping[str, Any]) -> bool:
    """Whether a config.json names code of the model's own, beside the file of ours."""
    entries = config.get("auto_map")
    names = entries.values() if isinstance(entries, Mapping) else ()
    return any(not str(name).startswith(f"{MODULE}.") for name in names)


def forget_unused_entry(config: Any) -> None:
    """Drop the entry from the configuration of a model that was loaded without the file, which `save_pretrained` does
    not copy then."""
    reference = (getattr(config, "auto_map", None) or {}).get("AutoConfig", "")
    if reference.startswith(f"{MODULE}.") and not type(config).__module__.endswith(MODULE):
        del config.auto_map
