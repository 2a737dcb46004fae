"""Models that are refused for their configuration alone, each with a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import save_tiny, tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import open_source

_BERT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def _edit(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path)


def _refused(folder: Path, message: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(SourceError, match=message) as caught:
        open_source(str(folder))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


def test_folder_without_config(llama: Path) -> None:
    (llama / "config.json").unlink()
    _refused(llama, r"has no config\.json, so it is not a model folder")


def test_folder_of_gguf_files(llama: Path) -> None:
    (llama / "config.json").unlink()
    (llama / "m-Q8_0.gguf").write_bytes(b"GGUF")
    _refused(llama, r"to read m-Q8_0\.gguf, give the path of that file")


def test_adapter_folder(llama: Path) -> None:
    (llama / "config.json").rename(llama / "adapter_config.json")
    _refused(llama, "is an adapter, not a model; merge it")


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_broken_config(content: str, llama: Path) -> None:
    (llama / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    _refused(llama, r"config\.json is not (a table|valid JSON)")


def test_config_with_invalid_values(llama: Path) -> None:
    _refused(_edit(llama, hidden_size="wide"), r"config\.json .*hidden_size")


def test_unknown_architecture_is_named(llama: Path) -> None:
    _edit(llama, model_type="quantum_llama", architectures=["QuantumLlamaForCausalLM"])
    _refused(llama, r"'quantum_llama' \(QuantumLlamaForCausalLM\).*unknown to transformers; install a version")


def test_code_in_the_checkpoint_is_not_run_by_default(llama: Path) -> None:
    _edit(llama, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (llama / "configuration_own.py").write_text(f"open({str(llama / 'ran')!r}, 'w')\n")
    _refused(llama, "trust_remote_code")
    assert not (llama / "ran").exists()


def test_encoder_only_text_model(tmp_path: Path) -> None:
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **_BERT)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    _refused(tmp_path, "BertForMaskedLM, an encoder without a causal decoder")


def test_decoder_of_an_encoder_family_is_accepted(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bert", **_BERT, is_decoder=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert type(open_source(str(tmp_path)).skeleton()).__name__ == "BertLMHeadModel"


def test_encoder_decoder(tmp_path: Path) -> None:
    config = AutoConfig.for_model("t5", vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    _refused(tmp_path, "T5ForConditionalGeneration, an encoder-decoder; only decoder language models")


def test_neither_a_language_nor_a_vision_model(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "wav2vec2", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,), conv_kernel=(3,), conv_stride=(2,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path)
    _refused(
        tmp_path, r"is Wav2Vec2Model \(model type wav2vec2\).*looked for a \.\.\.ForCausalLM class for Wav2Vec2Config"
    )


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_already_quantized(key: str, llama: Path) -> None:
    _refused(
        _edit(llama, **{key: {"quant_method": "gptq", "bits": 4}}), r"already quantized \(gptq\); give the original"
    )


def test_our_own_artifact(llama: Path) -> None:
    _edit(llama, quantization_config={"quant_method": "shiftadd"})
    _refused(llama, "already compressed by shiftadd; use `shiftadd evaluate` or `shiftadd inspect`")


def test_null_entry_is_not_a_quantization(llama: Path) -> None:
    assert open_source(str(_edit(llama, quantization_config=None))).dtype == torch.float32


def test_code_in_the_checkpoint_runs_when_trusted(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(llama / "modules"))
    monkeypatch.syspath_prepend(llama / "modules")
    (llama / "own_code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    _edit(llama, model_type="own", architectures=["OwnForCausalLM"], auto_map=auto)
    source = open_source(str(llama), trust_remote_code=True)
    source.materialise([""])
    assert type(source.skeleton()).__name__ == "OwnForCausalLM"
    tokens = torch.arange(20).reshape(1, -1)
    assert torch.equal(source.load_model()(tokens).logits, source.skeleton()(tokens).logits)


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        (
            "hf_quant_config.json",
            {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}},
            "NVIDIA ModelOpt",
        ),
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "AutoGPTQ"),
        ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4}, "AutoAWQ"),
    ],
)
def test_already_quantized_according_to_a_file_beside_the_configuration(
    file: str, content: dict[str, Any], method: str, llama: Path
) -> None:
    (llama / file).write_text(json.dumps(content))
    _refused(llama, rf"already quantized \({method}, as {file} says\)")


def test_model_with_only_a_quantized_cache_is_accepted(llama: Path) -> None:
    content = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (llama / "hf_quant_config.json").write_text(json.dumps(content))
    assert open_source(str(llama)).left_behind == ()


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_decoder_with_another_head(head: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "qwen2", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, num_labels=1,
    )  # fmt: skip
    getattr(transformers, f"Qwen2For{head}")(config).save_pretrained(tmp_path)
    _refused(tmp_path, rf"is Qwen2For{head}, a decoder whose head gives scores")


def test_reward_model_with_its_own_class(llama: Path) -> None:
    _refused(_edit(llama, architectures=["LlamaForRewardModel"]), "is LlamaForRewardModel, a decoder whose head")


def test_adapter_beside_a_model(llama: Path) -> None:
    (llama / "adapter_config.json").write_text("{}")
    _refused(llama, "holds a model and an adapter; merge the adapter")
