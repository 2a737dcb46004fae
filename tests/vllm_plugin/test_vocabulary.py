from __future__ import annotations

from typing import Any

import pytest
import torch
from artifacts import random_weight
from formats import matrix_format
from torch.nn.functional import linear

from shiftadd_cli.bcq.int8 import decode_table, encode_table
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.runtime.table import PackedTable
from shiftadd_cli.vllm_plugin.vocabulary import Vocabulary

ROWS, COLUMNS, PADDED = 50, 12, 64


def table() -> dict[str, torch.Tensor]:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    return dict(zip(("weight_int8", "weight_int8_scale"), encode_table(weight, "a"), strict=True))


def vocabulary(
    stored: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, form: MatrixFormat | None = None
) -> Vocabulary:
    result = Vocabulary("a", TableLayout((ROWS, COLUMNS), form), padded=PADDED, dtype=dtype)
    for suffix, tensor in stored.items():
        result.load(suffix, tensor)
    result.finish()
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vocabulary_looks_up_rows_and_multiplies_by_them(dtype: torch.dtype) -> None:
    loaded, stored = vocabulary(table(), dtype), table()
    dense = decode_table(stored["weight_int8"], stored["weight_int8_scale"])
    ids = torch.tensor([[0, 49], [7, 7]])
    assert torch.equal(loaded.look_up(ids), dense[ids].to(dtype))
    x, bias = torch.randn(3, COLUMNS).to(dtype), torch.randn(PADDED).to(dtype)
    logits = loaded.multiply(x, bias)
    assert (logits.shape, logits.dtype) == ((3, PADDED), dtype)
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    torch.testing.assert_close(logits[:, :ROWS].float(), (linear(x.float(), dense) + bias[:ROWS].float()), **tolerance)
    assert torch.equal(loaded.multiply(x)[:, ROWS:], torch.zeros(3, PADDED - ROWS, dtype=dtype))


def test_embedding_and_head_share_one_table() -> None:
    loaded = vocabulary(table())
    assert loaded.head.get_parameter("weight_int8") is loaded.embedding.get_parameter("weight_int8")
    assert loaded.head.get_buffer("weight_int8_scale") is loaded.embedding.get_buffer("weight_int8_scale")


def test_missing_tensor_is_named() -> None:
    with pytest.raises(ArtifactError, match=r"^The checkpoint lacks the tensor a.weight_int8_scale; "):
        vocabulary({"weight_int8": table()["weight_int8"]})


def test_mismatched_tensors_are_refused() -> None:
    stored = table()
    with pytest.raises(ArtifactError, match=r"^a.weight_int8 has shape \[49, 12\]"):
        vocabulary(stored | {"weight_int8": stored["weight_int8"][1:]})
    with pytest.raises(ArtifactError, match=r"^a.weight_int8_scale holds values that are not finite"):
        vocabulary(stored | {"weight_int8_scale": torch.full((ROWS,), torch.nan, dtype=torch.bfloat16)})


PLANES = [
    matrix_format(4, rotation="hadamard", offset=True, outlier_columns=0.1),
    matrix_format(3, "all", primitive="trellis1"),
    matrix_format(3, "all", "all", row_scale=False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", PLANES, ids=["planes", "trellis", "one group"])
def test_vocabulary_of_planes_looks_up_rows_and_multiplies_by_them(form: MatrixFormat, dtype: torch.dtype) -> None:
    weight = random_weight(PackedLayout(form, ROWS, COLUMNS))
    loaded, dense = vocabulary(weight.tensors, dtype, form), weight.decode()
    loaded.finish()
    ids, x = torch.tensor([[0, 49], [7, 7]]), torch.randn(3, COLUMNS).to(dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loaded.look_up(ids), dense[ids].to(dtype), rtol=4 * eps, atol=4 * eps)
    logits = loaded.multiply(x)
    exact, size = linear(x.double(), dense.double()), linear(x.double().abs(), dense.double().abs())
    assert ((logits[:, :ROWS].double() - exact).abs() <= 4 * eps * size + 1e-5).all()
    if form.row_scale:
        assert not logits[:, ROWS:].any()
    assert isinstance(loaded.embedding, PackedTable)
    assert isinstance(loaded.head, PackedTable)
    assert loaded.embedding.get_parameter("weight_codes") is loaded.head.get_parameter("weight_codes")


def test_padding_that_changes_the_groups_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"groups are 1/8 of the rows; .* --embedding-bits 8"):
        Vocabulary("a", TableLayout((ROWS, COLUMNS), matrix_format(4, group_rows="1/8")), padded=PADDED)
