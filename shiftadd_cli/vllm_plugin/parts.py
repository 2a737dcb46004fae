"""Which modules of a checkpoint make up one linear layer of vLLM, which computes q, k and v, or gate and up, as one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from shiftadd_cli.errors import ArtifactError

# Of a fused attention layer vLLM names the parts by letters, of all others by numbers.
_LETTERS = {"q": 0, "k": 1, "v": 2}


def part_names(prefix: str, packed: Mapping[str, Sequence[str]], listed: Collection[str]) -> tuple[str, ...]:
    """Names of the compressed modules that the layer `prefix` consists of, in its order; none: it is not compressed.

    packed: vLLM's `packed_modules_mapping`, from the last part of a layer's name to those of the modules it fuses;
    listed: all compressed modules. Raises ArtifactError where some of a layer's modules are compressed and others not.
    """
    if prefix in listed:
        return (prefix,)
    start, dot, last = prefix.rpartition(".")
    names = tuple(start + dot + each for each in packed.get(last, ()))
    found = [name for name in names if name in listed]
    if found and len(found) < len(names):
        absent = next(name for name in names if name not in listed)
        raise ArtifactError(
            f"{found[0]} is compressed and {absent} is not, and vLLM computes both as one layer; quantize the model "
            "again with --skip for both or for neither."
        )
    return names if found else ()


def part_index(shard: object, count: int, name: str) -> int:
    """Place among `count` parts of what vLLM calls the shard `shard`: None (the layer), "q", "k", "v" or a number.

    Raises ArtifactError, naming the layer `name`, for anything else.
    """
    place = 0 if shard is None and count == 1 else _LETTERS.get(shard) if isinstance(shard, str) else shard
    if type(place) is not int or not 0 <= place < count:
        raise ArtifactError(
            f"vLLM loads the part {shard!r} of {name}, of which the checkpoint has {count}; export the checkpoint "
            "for vLLM instead: shiftadd export OUT -o DIR --format dense."
        )
    return place
