"""The dense export has the names, shapes and tensors of the source's own files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from artifacts import COMMON, write_checkpoint
from safetensors.torch import load_file
from tiny_models import MIXTURES, tiny_model
from tiny_vision import tiny_vision_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, conversion_mapping
from transformers.core_model_loading import GroupWeightRename

import shiftadd_cli  # noqa: F401 - registers the format with transformers
from shiftadd_cli.export.dense import export_dense
from shiftadd_cli.export.original_names import OriginalNames
from shiftadd_cli.export.stacks import StackedModel
from shiftadd_cli.source.experts import join_experts

_SMALL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_MORE = {
    "glm4_moe": {**_SMALL, "moe_intermediate_size": 20, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                 "first_k_dense_replace": 1},
    "minimax": {**_SMALL, "num_local_experts": 4},
    "ernie4_5_moe": {**_SMALL, "moe_num_experts": 4, "moe_intermediate_size": 20, "moe_k": 2},
    # Not a mixture, but transformers 5 renames one of its tensors.
    "gpt_neox": _SMALL,
}  # fmt: skip
# A tensor in the hub's files of each family, and its shape.
_HUB_TENSORS = {
    "mixtral": ("model.layers.0.block_sparse_moe.experts.3.w2.weight", (32, 44)),
    "qwen3_moe": ("model.layers.0.mlp.experts.3.gate_proj.weight", (20, 32)),
    "deepseek_v3": ("model.layers.1.mlp.experts.3.up_proj.weight", (20, 32)),
    "gpt_oss": ("model.layers.0.mlp.experts.gate_up_proj", (4, 32, 72)),
    "granitemoe": ("model.layers.0.block_sparse_moe.input_linear.weight", (4, 56, 32)),
    "vit": ("vit.encoder.layer.0.attention.attention.query.weight", None),
}


def _model(family: str) -> PreTrainedModel:
    if family == "vit":
        return tiny_vision_model(family)
    if family in MIXTURES:
        return tiny_model(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_MORE[family]), dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    return model.eval()


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", [*MIXTURES, *_MORE, "vit"])
def test_names_and_shapes_are_those_of_the_source(family: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(_model(family), tmp_path / "packed", common=COMMON, tables=family in MIXTURES)
    # transformers itself writes the same model with the names of the family's files.
    join_experts(checkpoint.dense)
    checkpoint.dense.save_pretrained(tmp_path / "source")
    export_dense(checkpoint.folder, tmp_path / "dense")
    source, dense = (_tensors(tmp_path / name) for name in ("source", "dense"))
    assert dense.keys() == source.keys()
    for name, tensor in source.items():
        assert torch.equal(dense[name], tensor), name
    if family in _HUB_TENSORS:
        name, shape = _HUB_TENSORS[family]
        assert shape is None or dense[name].shape == shape
        assert name in dense


class _Decoded(StackedModel):
    """Three tensors, in an order in which a checkpoint may have them."""

    def __init__(self) -> None:
        self.tensors = dict.fromkeys(("a.norm1.weight", "a.norm0.weight", "b.weight"), ((2,), torch.float32))

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, torch.full((2,), float(index))) for index, name in enumerate(self.tensors))


def test_a_rule_that_depends_on_all_tensors_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second renaming acts only after the first: reverted one by one, two tensors would get the same name.
    rule = GroupWeightRename(["norm1", "norm2"], ["norm0", "norm1"])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: [rule])
    originals = OriginalNames(_Decoded(), tiny_model("llama"))
    assert set(originals.tensors) == {"a.norm1.weight", "a.norm2.weight", "b.weight"}
    values = {name: tensor[0].item() for name, tensor in originals}
    assert values == {"a.norm1.weight": 1.0, "a.norm2.weight": 0.0, "b.weight": 2.0}
