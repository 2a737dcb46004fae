"""Small configurations keep every kind of layer, and give small models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import transformers
from architectures.exceptions import EXCEPTIONS
from architectures.factory import Architecture, architectures, build, small_config
from architectures.shrinking import VOCAB_SIZE, small_settings

# Their library is not installed here, or no configuration builds them in this version of transformers.
NOT_BUILT = {
    "Gemma3nForConditionalGeneration",
    "Gemma4AssistantForCausalLM",
    "DinatForImageClassification",
    "TimmWrapperForImageClassification",
}


def _buildable() -> Iterator[Architecture]:
    for architecture in architectures():
        if architecture.name not in NOT_BUILT:
            yield architecture


def _named(name: str) -> Architecture:
    return next(architecture for architecture in architectures() if architecture.name == name)


def test_every_class_of_both_mappings_is_listed_once() -> None:
    from transformers.models.auto import modeling_auto

    listed = [architecture.name for architecture in architectures()]
    expected: set[str] = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for names in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values():
        expected |= {names} if isinstance(names, str) else set(names)
    assert len(listed) == len(set(listed))
    assert set(listed) == expected


def test_nearly_all_configurations_can_be_made_small() -> None:
    all_architectures = list(architectures())
    assert len(NOT_BUILT) < 0.05 * len(all_architectures)
    for architecture in _buildable():
        config = small_config(architecture).get_text_config()
        if not architecture.reads_images:
            assert config.vocab_size == VOCAB_SIZE, architecture.name


@pytest.mark.parametrize("field", ["layer_types", "mlp_layer_types", "layers_block_type"])
def test_every_kind_of_layer_is_kept(field: str) -> None:
    checked = 0
    for architecture in _buildable():
        config_class = getattr(transformers, architecture.name).config_class
        if architecture.model_type in EXCEPTIONS or not isinstance(
            before := getattr(config_class(), field, None), list
        ):
            continue
        after = getattr(small_config(architecture), field)
        assert set(after) == set(before), architecture.name
        assert 2 <= len(after) <= 16, architecture.name
        checked += 1
    assert checked > 1


def test_nested_settings_take_their_own_exceptions() -> None:
    config_class = transformers.Gemma4Config
    exceptions: dict[str, dict[str, Any]] = {"gemma4_text": {"final_logit_softcapping": 7.0}}
    nested = small_settings(config_class, exceptions)["text_config"]
    assert nested.final_logit_softcapping == 7.0
    changed = small_settings(config_class, {"gemma4": {"text_config.": {"final_logit_softcapping": 9.0}}, **exceptions})
    assert changed["text_config"].final_logit_softcapping == 9.0


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "JambaForCausalLM", "ViTForImageClassification"])
def test_models_are_random_and_reproducible_by_seed(name: str) -> None:
    first, again, other = (build(_named(name), seed).state_dict() for seed in (3, 3, 4))
    assert all(first[key].equal(again[key]) for key in first)
    for key, tensor in first.items():
        if tensor.is_floating_point():
            assert not tensor.equal(other[key]), key
            assert tensor.numel() == 1 or tensor.std() > 0, f"{key} is constant"
