"""Reads a model's configuration and refuses, before any work, models that cannot be compressed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from shiftadd_cli.errors import SourceError, first_line
from shiftadd_cli.source.vision import vision_class
from shiftadd_cli.version import QUANT_METHOD

_OTHER_HEAD = re.compile(r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)|Reward")
# Files next to config.json that other quantizers leave, and the names of these quantizers.
_QUANTIZER_FILES = {
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "quantize_config.json": "AutoGPTQ",
    "quant_config.json": "AutoAWQ",
}


def read_config(path: Path, *, remote_code: bool) -> Any:
    """The `PretrainedConfig` of the model folder `path`.

    Raises:
        SourceError: the configuration is missing or broken, the model is already quantized, or transformers does not
            know its type.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    raw = read_fields(path)
    _refuse_quantized(path, raw)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = raw.get("model_type")
    own_code = "AutoConfig" in (raw.get("auto_map") or {})
    if model_type not in CONFIG_MAPPING and not (own_code and remote_code):
        names = ", ".join(raw.get("architectures") or ()) or "no architecture named"
        cure = (
            "it brings code of its own, which runs only with `trust_remote_code=True`"
            if own_code
            else "install a version of transformers that knows it"
        )
        raise SourceError(f"The model type {model_type!r} ({names}) of {path} is unknown to transformers; {cure}.")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=remote_code, local_files_only=True)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, StrictDataclassError) as error:
        raise SourceError(f"{path / 'config.json'} cannot be used ({first_line(error)}); download it again.") from error


def model_class(config: Any, name: str, *, remote_code: bool) -> tuple[Any, Any]:
    """The class that loads `config` (a vision model, else a decoder) and the configuration for that class.

    Raises:
        SourceError: it is neither.
    """
    own_code = remote_code and getattr(config, "auto_map", None)
    if not own_code and (vision_model := vision_class(config, name)) is not None:
        return vision_model, config
    return causal_lm_class(config, name, remote_code=remote_code)


def causal_lm_class(config: Any, name: str, *, remote_code: bool) -> tuple[Any, Any]:
    """The class that loads `config` as a decoder language model, and the configuration for that class.

    The choice differs from `AutoModelForCausalLM` only in refusing encoders. `name` is for messages.

    Raises:
        SourceError: the architecture is an encoder, an encoder-decoder, or no language model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.auto_factory import get_class_from_dynamic_module
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING

    architecture = ", ".join(getattr(config, "architectures", None) or ()) or config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise SourceError(
            f"{name} is {architecture}, an encoder-decoder; only decoder language models (a ...ForCausalLM class of "
            "transformers) are supported."
        )
    own_code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if own_code and remote_code:
        return get_class_from_dynamic_module(own_code, config.name_or_path), config
    _refuse_other_head(config, name)
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        kind = "no decoder language model" if type(config) in MODEL_MAPPING else "not a model"
        raise SourceError(
            f"{name} is {architecture} (model type {config.model_type}), {kind} known to transformers: looked for a "
            f"...ForCausalLM class for {type(config).__name__}; choose a decoder language model."
        )
    entry = mapping[type(config)]
    listed: list[Any] = list(entry) if isinstance(entry, (list, tuple)) else [entry]
    candidates = {candidate.__name__: candidate for candidate in listed}
    named = [key for key in getattr(config, "architectures", None) or () if key in candidates]
    # An encoder family may also have a decoder class (as BERT does). There only `is_decoder` marks a causal model.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise SourceError(
            f"{name} is {architecture}, an encoder without a causal decoder (its configuration does not say "
            "is_decoder); only decoder language models are supported."
        )
    model_class = candidates[named[0]] if named else next(iter(candidates.values()))
    text_class = config.sub_configs.get("text_config")
    if text_class is not None and getattr(model_class, "config_class", None) is text_class:
        config = config.get_text_config()
    return model_class, config


def _refuse_other_head(config: Any, name: str) -> None:
    """Refuse a decoder with a head for another task, because it would lose that head as a language model."""
    for architecture in getattr(config, "architectures", None) or ():
        if _OTHER_HEAD.search(architecture):
            raise SourceError(
                f"{name} is {architecture}, a decoder whose head gives scores and not the next token; only language "
                "models (a ...ForCausalLM class) and image models can be compressed."
            )


def read_fields(folder: Path) -> dict[str, Any]:
    """The content of config.json in `folder`. Raises SourceError if it is missing or cannot be read."""
    file = folder / "config.json"
    adapter = (folder / "adapter_config.json").is_file()
    if adapter and file.is_file():
        # transformers applies the adapter if peft is installed, and ignores it otherwise.
        raise SourceError(f"{folder} holds a model and an adapter; merge the adapter, or remove adapter_config.json.")
    if not file.is_file():
        if adapter:
            raise SourceError(f"{folder} is an adapter, not a model; merge it into its base model first.")
        if ggufs := sorted(folder.glob("*.gguf")):
            raise SourceError(f"{folder} has no config.json; to read {ggufs[0].name}, give the path of that file.")
        raise SourceError(f"{folder} has no config.json, so it is not a model folder; give the folder that holds it.")
    return _read_table(file)


def _read_table(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file} is not valid JSON ({first_line(error)}); download it again.") from error
    if not isinstance(raw, dict):
        raise SourceError(f"{file} is not a table of settings; download it again.")
    return raw


def _refuse_quantized(folder: Path, raw: dict[str, Any]) -> None:
    tables = (raw, raw.get("text_config") or {})
    entry = next((c for t in tables for k in ("quantization_config", "compression_config") if (c := t.get(k))), None)
    if entry is None:
        _refuse_quantizer_files(folder)
        return
    method = entry.get("quant_method", "an unnamed method") if isinstance(entry, dict) else "an unnamed method"
    if method == QUANT_METHOD and isinstance(entry, dict) and "linear_attention" in entry:
        raise SourceError(
            f"{folder} has linear attention, which is not kept when a model is compressed; compress the original, and "
            "then run `shiftadd linearize` on the result."
        )
    if method == QUANT_METHOD:
        raise SourceError(
            f"{folder} was already compressed by shiftadd; use `shiftadd evaluate` or `shiftadd inspect` on it, or "
            "compress the original model again."
        )
    raise SourceError(f"{folder} is already quantized ({method}); give the original, unquantized model.")


def _refuse_quantizer_files(folder: Path) -> None:
    for file, method in _QUANTIZER_FILES.items():
        if not (folder / file).is_file():
            continue
        entry = _read_table(folder / file).get("quantization", {"quant_algo": method})
        # ModelOpt also writes the file if it left the weights unchanged.
        if not isinstance(entry, dict) or entry.get("quant_algo") is not None:
            raise SourceError(
                f"{folder} is already quantized ({method}, as {file} says); give the original, unquantized model."
            )
