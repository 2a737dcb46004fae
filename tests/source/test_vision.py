"""The class that loads a vision checkpoint, and the structure of its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_vision import VISION_FAMILIES, save_tiny_vision, tiny_vision_model, write_processor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedImageModeling,
    CvtForImageClassification,
    FocalNetForImageClassification,
    PreTrainedModel,
)

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import find_structure, open_source
from shiftadd_cli.source.vision import vision_class


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_checkpoint_is_opened_as_the_class_it_was_saved_as(family: str, tmp_path: Path) -> None:
    save_tiny_vision(family, tmp_path)
    source = open_source(str(tmp_path))
    assert source.reads_images
    assert [type(source.skeleton()).__name__] == json.loads((tmp_path / "config.json").read_text())["architectures"]
    expected = tiny_vision_model(family).state_dict()
    state = source.load_model().state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_checkpoint_for_another_task_is_opened_as_the_bare_model(tmp_path: Path) -> None:
    config = tiny_vision_model("vit").config
    config.encoder_stride = config.patch_size
    config.architectures = None
    model = AutoModelForMaskedImageModeling.from_config(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="lacks 2 of the tensors ViTModel needs"):
        # Its pooler was never trained, so it is not in the checkpoint.
        open_source(str(tmp_path))


def test_dual_model_is_refused_with_a_hint_to_its_vision_tower(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model(
        "clip",
        text_config={**small, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**small, "image_size": 16, "patch_size": 8},
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=r"CLIPModel, .*CLIPVisionModel\.from_pretrained") as caught:
        open_source(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_image_processor_works_without_torchvision_and_is_required(tmp_path: Path) -> None:
    save_tiny_vision("vit", tmp_path)
    assert open_source(str(tmp_path)).load_image_processor().size == {"height": 16, "width": 16}
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(SourceError, match=r"holds no image processor; put preprocessor_config\.json"):
        open_source(str(tmp_path)).load_image_processor()
    write_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(SourceError, match="cannot be read"):
        open_source(str(tmp_path)).load_image_processor()


def test_stages_are_split_and_downsampling_is_a_block() -> None:
    model = tiny_vision_model("swin")
    structure = find_structure(model)
    prefix = "swin.encoder.layers"
    assert structure.block_list == prefix
    assert structure.blocks == tuple(
        f"{prefix}.{name}" for name in ("0.blocks.0", "0.blocks.1", "0.downsample", "1.blocks.0", "1.blocks.1")
    )
    assert [spec.kind for spec in structure.linears if spec.block == 2] == ["reduction"]
    assert {spec.kind for spec in structure.linears if spec.block == 4} == {
        *(f"attention.{name}_proj" for name in "qkvo"), "mlp.fc1", "mlp.fc2",
    }  # fmt: skip
    covered = (*structure.outside, *structure.blocks)
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        assert sum(name == part or name.startswith(part + ".") for part in covered) == 1, name


@pytest.mark.parametrize(("family", "classifier"), [("vit", True), ("deit-teacher", True), ("dinov2-bare", False)])
def test_patch_embedding_and_classifier_are_kept_with_a_reason(family: str, classifier: bool) -> None:
    reasons = dict(find_structure(tiny_vision_model(family)).kept)
    assert list(reasons.values()).count("patch embedding") == 1
    heads = [name for name, reason in reasons.items() if reason == "classifier"]
    assert all("classifier" in name for name in heads)
    assert bool(heads) == classifier


@pytest.mark.parametrize(
    ("family", "expected"),
    [("cvt", CvtForImageClassification), ("focalnet", FocalNetForImageClassification)],
)
def test_class_that_does_not_declare_its_input_is_recognized(family: str, expected: type[PreTrainedModel]) -> None:
    config = AutoConfig.for_model(family)
    config.architectures = [expected.__name__]
    assert vision_class(config, family) is expected
