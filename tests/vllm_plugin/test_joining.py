from __future__ import annotations

from typing import Any

import pytest
import torch
from artifacts import FORMATS, random_matrix

from shiftadd_cli.vllm_plugin.joining import can_join, join, runs

FORMS: list[dict[str, Any]] = [
    *({"scale_format": scale_format} for scale_format in FORMATS),
    {"row_scale": False},
    {"offset": True},
    {"offset": True, "scale_format": "float", "rotation": "hadamard"},
    {"rotation": "hadamard", "outlier_columns": 0.1},
    {"primitive": "shift1"},
    {"primitive": "shift2", "rotation": "hadamard"},
]


@pytest.mark.parametrize("form", FORMS)
def test_joined_matrices_decode_to_the_same_numbers(form: dict[str, Any]) -> None:
    weights = [random_matrix(rows, seed, **form) for seed, rows in enumerate((24, 7, 8))]
    assert all(can_join(weights[0], weight) for weight in weights)
    joined = join(weights)
    assert {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in joined.tensors.items()
    } == joined.layout.tensors()
    assert torch.equal(joined.decode_stored(), torch.cat([weight.decode_stored() for weight in weights]))
    assert torch.equal(joined.decode(), torch.cat([weight.decode() for weight in weights]))


@pytest.mark.parametrize("primitive", ["trellis1", "trellis2"])
def test_trellis_coded_planes_are_joined_in_whole_stripes(primitive: str) -> None:
    weights = [random_matrix(rows, seed, primitive=primitive, bits=2) for seed, rows in enumerate((512, 256, 300))]
    assert [len(run) for run in runs(weights)] == [3]
    assert torch.equal(join(weights).decode_stored(), torch.cat([weight.decode_stored() for weight in weights]))
    assert [len(run) for run in runs([*reversed(weights)])] == [1, 2]
    assert not can_join(weights[2], weights[0])


@pytest.mark.parametrize(
    "form", [{"bits": 2}, {"group_size": 32}, {"scale_format": "pot"}, {"offset": True}, {"primitive": "shift1"}]
)
def test_matrices_of_other_formats_stay_apart(form: dict[str, Any]) -> None:
    assert not can_join(random_matrix(8, 0), random_matrix(8, 1, **form))


def test_matrices_whose_rows_share_scales_stay_apart() -> None:
    assert not can_join(random_matrix(8, 0, group_rows=4), random_matrix(8, 1, group_rows=4))


@pytest.mark.parametrize("name", ["weight_signs", "weight_column_ids"])
def test_matrices_of_other_rotations_or_outlier_columns_stay_apart(name: str) -> None:
    first, second = (random_matrix(8, seed, rotation="hadamard", outlier_columns=0.1) for seed in (0, 1))
    second.tensors[name] = second.tensors[name] + 1
    assert not can_join(first, second)


def test_neighbours_are_joined_in_order() -> None:
    weights = [random_matrix(8, 0), random_matrix(4, 1), random_matrix(4, 2, bits=2), random_matrix(6, 3)]
    assert [len(run) for run in runs(weights)] == [2, 1, 1]
    assert [weight for run in runs(weights) for weight in run] == weights


def test_single_matrix_is_returned_as_it_is() -> None:
    weight = random_matrix(8, 0, row_scale=False)
    assert join([weight]) is weight
