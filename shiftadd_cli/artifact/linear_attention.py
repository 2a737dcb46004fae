"""The linear attention layers of a checkpoint: their entry in config.json, and the tensors of their feature maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from shiftadd_cli.errors import ArtifactError

# The submodule of an attention layer that holds these tensors.
SUBMODULE = "feature_map"
# Larger numbers overflow byte counters.
_LARGEST = 10**9


class Heads(NamedTuple):
    """Heads of queries, heads of keys, and numbers in a head, of an attention layer."""

    queries: int
    keys: int
    size: int


_Shapes = Mapping[str, tuple[int, ...]]


def _exponential(heads: Heads) -> _Shapes:
    queries, keys, size = heads
    return {
        "query_weight": (queries, size, size),
        "query_bias": (queries, size),
        "log_scale": (queries, size),
        "key_weight": (keys, size, size),
        "key_bias": (keys, size),
    }


def _similarity(heads: Heads) -> _Shapes:
    queries, keys, size = heads
    return {
        "query_turn": (queries, size, size),
        "key_turn": (keys, size, size),
        "query_weight": (queries, size),
        "query_bias": (queries,),
        "key_weight": (keys, size),
        "key_bias": (keys,),
    }


def _none(_: Heads) -> _Shapes:
    return {}


# Shapes of the tensors of each feature map, all float32. `window` forgets distant tokens.
MAP_TENSORS: Mapping[str, Callable[[Heads], _Shapes]] = {
    "window": _none,
    "exp": _exponential,
    "angular": _similarity,
    "binary": _similarity,
}


@dataclass(frozen=True)
class LinearAttentionFormat:
    """The key `linear_attention` of a `quantization_config`, see docs/format.md.

    Attributes:
        map: name of the feature map; window, sinks: see `runtime.linear_attention.attention.Reach`.
        modules: heads of each linear attention layer, by the name of its module.
    """

    map: str
    window: int
    sinks: int
    modules: Mapping[str, Heads]

    @classmethod
    def from_dict(cls, entry: object) -> LinearAttentionFormat:
        """Read the entry; raises ArtifactError for anything missing or ill-typed."""
        if not isinstance(entry, Mapping):
            raise _invalid("linear_attention", entry)
        name, modules = entry.get("map"), entry.get("modules")
        if not isinstance(name, str) or name not in MAP_TENSORS:
            raise _invalid("linear_attention.map", name)
        if not isinstance(modules, Mapping) or not modules:
            raise _invalid("linear_attention.modules", modules)
        heads = {module: _heads(module, value) for module, value in modules.items()}
        return cls(name, _count(entry, "window", 1), _count(entry, "sinks", 0), heads)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that `from_dict` reads."""
        modules = {name: {"heads": list(heads)} for name, heads in self.modules.items()}
        return {"map": self.map, "window": self.window, "sinks": self.sinks, "modules": modules}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors of the feature maps, by name in the checkpoint."""
        return {
            f"{module}.{SUBMODULE}.{name}": shape
            for module, heads in self.modules.items()
            for name, shape in MAP_TENSORS[self.map](heads).items()
        }


def _heads(module: str, value: object) -> Heads:
    numbers = value.get("heads") if isinstance(value, Mapping) else None
    if isinstance(numbers, list) and len(numbers) == 3:
        heads = Heads(*numbers)
        if all(type(number) is int and 0 < number < _LARGEST for number in heads) and heads.queries % heads.keys == 0:
            return heads
    raise _invalid(f"linear_attention.modules[{module!r}]", value)


def _count(entry: Mapping[str, object], key: str, least: int) -> int:
    value = entry.get(key)
    if type(value) is not int or not least <= value < _LARGEST:
        raise _invalid(f"linear_attention.{key}", value)
    return value


def _invalid(key: str, value: object) -> ArtifactError:
    return ArtifactError(f"quantization_config has {key} = {value!r}, which is not valid; make the checkpoint again.")
