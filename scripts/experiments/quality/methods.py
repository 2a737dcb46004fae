"""Methods of a comparison by name: recipes, recipes with changes, and third-party libraries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.quality.peers import PEER_FIELDS, PEERS, Peer
from shiftadd_cli.errors import RecipeError
from shiftadd_cli.recipe import BITS, Recipe

PEER_PREFIX = "peer:"

_CONTINUES = re.compile(r"\s*[A-Za-z_]+=")
# Text between commas; a comma within quotes does not separate.
_BETWEEN_COMMAS = re.compile(r'(?:[^,"]|"[^"]*")+')


@dataclass(frozen=True)
class Method:
    """One line of the comparison: `label` as typed, the recipe it starts from and the fields it changes.

    peer: the library to use instead of our own solver; it takes bits, group size and calibration from the recipe.
    """

    label: str
    recipe: str = "default"
    overrides: dict[str, Any] = field(default_factory=dict)
    peer: Peer | None = None

    @property
    def has_own_width(self) -> bool:
        """Whether the fields of the method set the bits of layers."""
        return any(name in self.overrides for name in BITS)

    def at(self, bits: int) -> bool:
        """Whether the method has a row at this width. A method with an average has one at the average rounded down."""
        average = self.overrides.get("avg_bits", self.overrides.get("avg_file_bits"))
        return not isinstance(average, int | float) or int(average) == bits

    def resolve(self, bits: int, common: dict[str, Any]) -> Recipe:
        """The recipe at this bit width. `common`: fields that all methods share. The method's own changes override
        them, and a recipe without a calibration text stays without one.

        Raises RecipeError, naming the method, if the fields are wrong or do not go together.
        """
        try:
            plain = Recipe.load(self.recipe, self.overrides)
            shared = {"calibration": "none"} if plain.calibration == "none" else {}
            width = {} if self.has_own_width else {"bits": bits}
            return Recipe.load(self.recipe, {**common, **shared, **self.overrides, **width})
        except RecipeError as error:
            raise RecipeError(f"Method {self.label}: {error}") from None


def split_names(text: str) -> list[str]:
    """The methods of a list such as `default:group_size=128,offset=false,gptq`: a part of the form `field=value`
    belongs to the method before it, and a value with commas is in quotes."""
    names: list[str] = []
    for part in _BETWEEN_COMMAS.findall(text):
        if names and _CONTINUES.match(part):
            names[-1] += "," + part.strip()
        else:
            names.append(part.strip())
    return [name for name in names if name]


def parse_methods(lists: Iterable[str]) -> list[Method]:
    """The methods of several lists, in order and without duplicates. Raises RecipeError if one of them is wrong."""
    labels = dict.fromkeys(name for text in lists for name in split_names(text))
    return [_parse(label) for label in labels]


def rows_of(methods: Iterable[Method], widths: Sequence[int]) -> list[tuple[Method, int]]:
    """The rows of a table, width by width. Raises RecipeError if a method has none."""
    methods = list(methods)
    for method in methods:
        if not any(method.at(bits) for bits in widths):
            raise RecipeError(
                f"Method {method.label}: its average belongs to other --bits than {', '.join(map(str, widths))}; give "
                "the average rounded down."
            )
    return [(method, bits) for bits in widths for method in methods if method.at(bits)]


def _parse(label: str) -> Method:
    name, _, changes = label.removeprefix(PEER_PREFIX).partition(":")
    overrides = dict(_change(label, change) for change in _BETWEEN_COMMAS.findall(changes)) if changes else {}
    if "bits" in overrides:
        raise RecipeError(f"Method {label}: give bit widths to --bits, where all methods share them.")
    if not label.startswith(PEER_PREFIX):
        method = Method(label, name, overrides)
    elif name in PEERS:
        foreign = [key for key in overrides if key not in PEER_FIELDS]
        if foreign:
            raise RecipeError(f"Method {label}: peers take {', '.join(sorted(PEER_FIELDS))}, not {foreign[0]}.")
        PEERS[name].require()
        # Peers have no such field, and their rows must keep their names when our default changes.
        method = Method(label, "equal-bits", {"asymmetric": 0.0, **overrides}, PEERS[name])
    else:
        raise RecipeError(f"There is no peer {name!r}; there are {', '.join(PEERS)}.")
    # Every primitive supports two bits.
    method.resolve(2, {})
    return method


def _change(label: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and value):
        raise RecipeError(f"Method {label}: {text!r} is not of the form field=value.")
    field_name = name.strip()
    if field_name == "skip":
        # Without a comma there is only one pattern.
        return field_name, (value,)
    try:
        return field_name, json.loads(value)
    except ValueError:
        return field_name, value
