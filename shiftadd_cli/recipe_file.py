"""The packaged recipes, and the YAML reader for recipe files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from shiftadd_cli.errors import RecipeError

MAX_BYTES = 1_000_000

_PACKAGE = Path(__file__).resolve().parent


def configs_folder() -> Path:
    """Folder of the packaged recipes: inside the package when installed from a wheel, next to it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def packaged_names() -> tuple[str, ...]:
    """Names of the packaged recipes, sorted."""
    return tuple(sorted(path.stem for path in configs_folder().glob("*.yaml")))


def read_mapping(path: Path) -> dict[str, Any]:
    """The fields of a YAML file. Raises RecipeError with one sentence if the file is not a flat list of fields."""
    try:
        if not path.is_file():
            raise RecipeError(f"Recipe {path} is not a file; give the path of a YAML file.")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise RecipeError(f"Recipe {path} has {size} bytes; a recipe is a short YAML file of at most {MAX_BYTES}.")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"Recipe {path} is not UTF-8 text; give the path of a YAML file.") from None
    except OSError as failure:
        raise RecipeError(f"Recipe {path} cannot be read: {failure.strerror}.") from None
    try:
        loaded = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as failure:
        mark = failure.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ":"
        raise RecipeError(f"Recipe {path},{where} {failure.problem}.") from None
    except (yaml.YAMLError, ValueError) as failure:
        raise RecipeError(f"Recipe {path} is not valid YAML: {' '.join(str(failure).split())}.") from None
    except RecursionError:
        raise RecipeError(f"Recipe {path} is nested too deeply; a recipe is a flat list of 'field: value'.") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise RecipeError(f"Recipe {path} holds a {type(loaded).__name__}; it must be a list of 'field: value'.")
    for key in loaded:
        if not isinstance(key, str):
            raise RecipeError(f"Recipe {path}: {short(key)} is not a field name.")
    return loaded


def word(value: object) -> str:
    """A value as YAML spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def short(value: object) -> str:
    """A value shortened for a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that rejects duplicate keys and aliases, and reads 1e-2 as a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        # A few nested aliases can expand to gigabytes, and a flat recipe needs none.
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed in a recipe", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"field {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads exponents only after a decimal point and with a sign (1.0e-2); it takes anything else as a string.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
