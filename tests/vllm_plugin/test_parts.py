from __future__ import annotations

import pytest

from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.vllm_plugin.parts import part_index, part_names

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LISTED = {"a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "b.gate_proj", "c.qkv_proj"}


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("a.qkv_proj", ("a.q_proj", "a.k_proj", "a.v_proj")),
        ("a.o_proj", ("a.o_proj",)),
        ("b.down_proj", ()),
        ("b.qkv_proj", ()),
        # Some models store it as one (Phi-3).
        ("c.qkv_proj", ("c.qkv_proj",)),
    ],
)
def test_fused_layer_consists_of_the_listed_modules_in_order(prefix: str, names: tuple[str, ...]) -> None:
    assert part_names(prefix, PACKED, LISTED) == names


def test_module_without_a_parent_has_parts_too() -> None:
    assert part_names("qkv_proj", PACKED, {"q_proj", "k_proj", "v_proj"}) == ("q_proj", "k_proj", "v_proj")


def test_partly_compressed_layer_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"^b.gate_proj is compressed and b.up_proj is not, .* --skip for both"):
        part_names("b.gate_up_proj", PACKED, LISTED)


@pytest.mark.parametrize(
    ("shard", "count", "index"), [(None, 1, 0), ("q", 3, 0), ("k", 3, 1), ("v", 3, 2), (0, 2, 0), (1, 2, 1), (0, 1, 0)]
)
def test_shards_have_indices(shard: object, count: int, index: int) -> None:
    assert part_index(shard, count, "a") == index


@pytest.mark.parametrize(("shard", "count"), [(None, 2), ("z", 3), (2, 2), (-1, 2), ((0, 1), 3), (True, 2), ("v", 2)])
def test_unknown_shards_are_refused(shard: object, count: int) -> None:
    with pytest.raises(ArtifactError, match=r"the part .* of a, of which the checkpoint has .*export"):
        part_index(shard, count, "a")
