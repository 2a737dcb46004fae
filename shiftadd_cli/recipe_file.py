"""Reading a recipe from YAML, and turning every fault in it into one sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from shiftadd_cli.errors import RecipeError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from shiftadd_cli.recipe import Recipe

MAX_BYTES = 1_000_000

# The ways to say how many bits layers get.
_BITS = ("bits", "avg_bits", "bit_plan")

_PACKAGE = Path(__file__).resolve().parent


def configs_folder() -> Path:
    """Folder of the packaged recipes: inside the package when installed from a wheel, beside it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def packaged_names() -> tuple[str, ...]:
    """Names of the packaged recipes, sorted."""
    return tuple(sorted(path.stem for path in configs_folder().glob("*.yaml")))


def load_recipe(model: type[Recipe], name_or_path: str, overrides: dict[str, Any]) -> Recipe:
    """See `Recipe.load`."""
    packaged = name_or_path in packaged_names()
    if packaged:
        path = configs_folder() / f"{name_or_path}.yaml"
    else:
        path = Path(name_or_path)
        if not path.exists():
            raise RecipeError(_no_such_recipe(name_or_path))
    values = _read_mapping(path)
    return _build(model, values, overrides, f"Recipe {path}", given=() if packaged else values)


def nearest_recipe(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The packaged recipe that differs least from a recipe as JSON, `default` before others that are as near, and the
    fields to put on top."""
    from shiftadd_cli.recipe import Recipe

    found = {}
    for name in ("default", *packaged_names()):
        usual = Recipe.load(name).model_dump(mode="json")
        on_top = {key: value for key, value in fields.items() if value != usual.get(key)}
        if any(way in on_top for way in _BITS):
            # What is said in one way is refused in another.
            said = next((way for way in _BITS[1:] if fields.get(way) is not None), "bits")
            on_top = {said: fields.get(said)} | {key: value for key, value in on_top.items() if key not in _BITS}
        found[name] = on_top
    return min(found.items(), key=lambda each: len(each[1]))


def change_recipe(recipe: Recipe, overrides: dict[str, Any]) -> Recipe:
    """See `Recipe.changed`."""
    return _build(type(recipe), recipe.model_dump(), overrides, "The recipe", given=recipe.model_fields_set)


def _build(
    model: type[Recipe], values: dict[str, Any], overrides: dict[str, Any], origin: str, given: Iterable[str]
) -> Recipe:
    """The recipe of `values` with `overrides` on top. `given`: fields of `values` that the user gave, which become its
    `model_fields_set` with the overrides."""
    said = [name for name in _BITS if name in overrides]
    if len(said) > 1:
        raise RecipeError(
            f"{' and '.join(_option(name) for name in said)} say how many bits layers get; give one of them."
        )
    if said or overrides.get("primitive", "bcq") != "bcq":
        # What is said on top takes the place of what is said below in another way, and shifts are for all layers alike.
        values = {name: value for name, value in values.items() if name not in _BITS}
    try:
        built = model(**{**values, **overrides})
    except ValidationError as failure:
        faults = [_sentence(error, origin, overrides, tuple(model.model_fields)) for error in failure.errors()]
        raise RecipeError("; ".join(dict.fromkeys(faults)) + ".") from None
    return model.model_construct({*given, *overrides}, **dict(built))


def _no_such_recipe(name: str) -> str:
    names = packaged_names()
    return (
        f"There is no recipe or file {name!r}{_nearest(name, names)}; "
        f"packaged recipes are {', '.join(names)}, anything else must be the path of a YAML file."
    )


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.replace("-", "_"), list(known), n=1)
    close = close or difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _read_mapping(path: Path) -> dict[str, Any]:
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
            raise RecipeError(f"Recipe {path}: {_short(key)} is not a field name.")
    return loaded


def _sentence(error: ErrorDetails, recipe: str, overrides: dict[str, Any], fields: tuple[str, ...]) -> str:
    location = error["loc"]
    if not location:
        changed = "".join(f" {_option(name)}" for name in overrides)
        origin = recipe + (f" with{changed}" if changed else "")
        return f"{origin}: {error['msg'].removeprefix('Value error, ')}"
    field = str(location[0])
    origin = f"Option {_option(field)}" if field in overrides else f"{recipe}, field {field!r}"
    if error["type"] == "extra_forbidden":
        return f"{origin} is unknown{_nearest(field, fields)}"
    value = error["input"]
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{origin}: {_short(value)} is not valid: {message}"


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and aliases, and reads 1e-2 as the number everybody means by it."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        # A few aliases of aliases unfold into gigabytes, and a flat recipe has no use for one.
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


# YAML 1.1 reads exponents only after a decimal point and with a sign (1.0e-2), everything else is a string to it.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
