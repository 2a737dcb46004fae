"""The modules of a checkpoint that make up one linear layer of vLLM, which fuses q, k and v, and gate and up."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from shiftadd_cli.errors import ArtifactError

# vLLM names the parts of a fused attention layer by letters, and those of all other layers by numbers.
_LETTERS = {"q": 0, "k": 1, "v": 2}


def part_names(prefix: str, packed: Mapping[str, Sequence[str]], listed: Collection[str]) -> tuple[str, ...]:
    """Names of the compressed modules that the layer `prefix` consists of, in its order; empty if it is not compressed.

    packed: vLLM's `packed_modules_mapping`, from the last part of a layer's name to those of the modules it fuses;
    listed: all compressed modules. Raises ArtifactError if only some of a layer's modules are compressed.
    """
    if prefix in listed:
        return (prefix,)
    start, dot, last = prefix.rpartition(".")
    names = tuple(start + dot + part for part in packed.get(last, ()))
    compressed = [name for name in names if name in listed]
    if compressed and len(compressed) < len(names):
        absent = next(name for name in names if name not in listed)
        raise ArtifactError(
            f"{compressed[0]} is compressed and {absent} is not, but vLLM computes both as one layer; quantize the "
            "model again with --skip for both or for neither."
        )
    return names if compressed else ()


def part_index(shard: object, count: int, name: str) -> int:
    """Index among `count` parts of the one that vLLM calls `shard`: None (the layer), "q", "k", "v" or a number.

    Raises ArtifactError, naming the layer `name`, for anything else.
    """
    index = 0 if shard is None and count == 1 else _LETTERS.get(shard) if isinstance(shard, str) else shard
    if type(index) is not int or not 0 <= index < count:
        raise ArtifactError(
            f"vLLM loads the part {shard!r} of {name}, of which the checkpoint has {count}; export the checkpoint "
            "for vLLM instead: shiftadd export OUT -o DIR --format dense."
        )
    return index
