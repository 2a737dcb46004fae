"""Opens models to measure: originals and our own checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shiftadd_cli.device import computes_in, dtype_name
from shiftadd_cli.errors import ArtifactError, SourceError, first_line
from shiftadd_cli.runtime.remote_code import brings_code
from shiftadd_cli.runtime.skeleton import artifact_skeleton, read_artifact_config
from shiftadd_cli.source import Source, open_source
from shiftadd_cli.source.companions import copy_companions
from shiftadd_cli.source.image_processor import load_image_processor
from shiftadd_cli.source.locate import locate
from shiftadd_cli.source.positions import position_limit
from shiftadd_cli.source.tokenizer import load_tokenizer
from shiftadd_cli.source.vision import is_classifier, vision_class
from shiftadd_cli.version import QUANT_METHOD


@dataclass(frozen=True)
class ModelInfo:
    """The entries of a report on a model, in addition to its scores.

    Attributes:
        spec: the name that the user typed.
        compressed: whether it is a checkpoint of ours.
        file_bytes: all its weight files on disk.
        parameters: number in the original model; tied ones count once.
        file_bits_per_weight: 8 * file_bytes / parameters.
        quantized_bits_per_weight: stored bits of the compressed layers divided by their weights; None for an original.
        stored_dtype, dtype: of the uncompressed tensors, in the files and in this measurement.
        calibration, calibration_fingerprint: name and SHA-256 of the calibration data, if its report has them.
        calibration_parts: SHA-256 of each text of a mixture.
    """

    spec: str
    compressed: bool
    file_bytes: int
    parameters: int
    file_bits_per_weight: float
    quantized_bits_per_weight: float | None
    stored_dtype: str
    dtype: str
    calibration: str | None
    calibration_fingerprint: str | None
    calibration_parts: tuple[str, ...] = ()

    def was_calibrated_on(self, fingerprint: str) -> bool:
        """Whether the model was calibrated on the data with this SHA-256, alone or as a part of a mixture."""
        return fingerprint in (self.calibration_fingerprint, *self.calibration_parts)


class Loaded(NamedTuple):
    """A model in evaluation mode on its device, its tokenizer (None for a vision model) and its `ModelInfo`."""

    model: Any
    tokenizer: Any
    info: ModelInfo


class Opened:
    """A model of which only the headers have been read; created by `open_any`."""

    def __init__(
        self, spec: str, path: Path, source: Source | None, config: dict[str, Any], *, trust_remote_code: bool = False
    ) -> None:
        self.spec, self.path, self._source, self._config = spec, path, source, config
        self._remote_code = trust_remote_code and brings_code(config)
        self._tokenizer: Any = None
        self._image_processor: Any = None

    @cached_property
    def reads_images(self) -> bool:
        """Whether it is a vision model; a language model otherwise."""
        if self._source is not None:
            return self._source.reads_images
        return self._vision_class is not None

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the uncompressed tensors in the files."""
        return self._source.dtype if self._source is not None else _dtype_of(self._config)

    @property
    def positions(self) -> int | None:
        """Upper limit of tokens in a text, see `position_limit`; None for a model without one."""
        return position_limit(self.config)

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""
        size: int = self._text_config.vocab_size
        return size

    @cached_property
    def config(self) -> Any:
        """The configuration of the model."""
        if self._source is not None:
            return self._source.config
        return read_artifact_config(self.path, remote_code=self._remote_code)

    def skeleton(self) -> Any:
        """The model on meta."""
        if self._source is not None:
            return self._source.skeleton()
        return artifact_skeleton(self.path, trust_remote_code=self._remote_code)

    @property
    def has_linear_attention(self) -> bool:
        """Whether some of its attention layers have a state of constant size."""
        return self._source is None and "linear_attention" in self._config["quantization_config"]

    @property
    def file_bytes(self) -> int:
        """Size of all its weight files."""
        if self._source is not None:
            return self._source.file_bytes
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))

    def save_companions(self, folder: Path) -> None:
        """Write its tokenizer and other small files, all but weights and configuration, to `folder`."""
        if self._source is not None:
            self._source.save_companions(folder)
        else:
            copy_companions(self.path, folder, code=self._remote_code)

    @cached_property
    def classes(self) -> dict[int, str] | None:
        """Class names of a vision model by number; None for a model without class scores."""
        model = self._source.skeleton() if self._source is not None else self._vision_class
        if not self.reads_images or not is_classifier(model):
            return None
        return {int(number): str(name) for number, name in self.config.id2label.items()}

    @property
    def _vision_class(self) -> Any | None:
        # A model's own code is supported for language models only, see `source.config.model_class`.
        return None if self._remote_code else vision_class(self.config, self.spec)

    @property
    def _text_config(self) -> Any:
        return self.config.get_text_config()

    def load_tokenizer(self) -> Any:
        """The tokenizer, read once; raises SourceError if there is none."""
        if self.reads_images:
            raise SourceError(
                f"{self.spec} is a vision model, which reads no text; give a language model, or measure this one on "
                "images with `shiftadd evaluate`."
            )
        if self._source is not None:
            return self._source.load_tokenizer()
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path, remote_code=self._remote_code)
        return self._tokenizer

    def load_image_processor(self) -> Any:
        """The image processor of a vision model, read once; raises SourceError if there is none."""
        if self._source is not None:
            return self._source.load_image_processor()
        if self._image_processor is None:
            self._image_processor = load_image_processor(self.path)
        return self._image_processor

    def load(self, dtype: str = "auto", device: torch.device | None = None) -> Loaded:
        """Load the model; `dtype` is `auto` (see `computing_dtype`), `float32`, `bfloat16` or `float16`.

        Raises:
            SourceError, ArtifactError: the files are damaged or incomplete.
        """
        device = device or torch.device("cpu")
        stored = self.stored_dtype
        computed = computing_dtype(dtype, stored, device)
        model: Any = self._source.load_model(computed) if self._source is not None else self._load_artifact(computed)
        model.to(device).eval()
        parameters, quantized = _count(model)
        calibration = _calibration_of(self.path) if self._source is None else {}
        info = ModelInfo(
            spec=self.spec,
            compressed=self._source is None,
            file_bytes=self.file_bytes,
            parameters=parameters,
            file_bits_per_weight=8 * self.file_bytes / parameters,
            quantized_bits_per_weight=quantized,
            stored_dtype=dtype_name(stored),
            dtype=dtype_name(computed),
            calibration=calibration.get("name"),
            calibration_fingerprint=calibration.get("fingerprint"),
            calibration_parts=tuple(part["fingerprint"] for part in calibration.get("parts", ())),
        )
        return Loaded(model, None if self.reads_images else self.load_tokenizer(), info)

    def _load_artifact(self, dtype: torch.dtype) -> Any:
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        from shiftadd_cli.runtime import transformers_plugin

        transformers_plugin.register()
        try:
            return (self._vision_class or AutoModelForCausalLM).from_pretrained(
                self.path,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=self._remote_code,
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = first_line(error)
            raise ArtifactError(
                f"The checkpoint {self.path} cannot be loaded ({reason}); see `shiftadd inspect --verify`, and "
                "quantize again."
            ) from error


def open_any(spec: str, *, trust_remote_code: bool = False) -> Opened:
    """Open an original (`demo`, a folder, a .gguf file, a hub id) or one of our checkpoints, reading headers only.

    trust_remote_code: run model code that comes with it.

    Raises:
        SourceError: there is no such model, or its kind is not supported.
    """
    path = locate(spec, remote_code=trust_remote_code)
    config = _read_json(path / "config.json") if path.is_dir() else {}
    if (config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD:
        return Opened(spec, path, None, config, trust_remote_code=trust_remote_code)
    return Opened(spec, path, open_source(spec, trust_remote_code=trust_remote_code), config)


def load_any(spec: str, dtype: str = "auto", device: torch.device | None = None) -> Loaded:
    """`open_any` followed by `load`."""
    return open_any(spec).load(dtype, device)


def computing_dtype(requested: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in: the requested one, or for `auto` the stored one if the device computes in it.

    A CPU without instructions for a 16-bit type computes in float32 instead, which is faster there.
    """
    if requested != "auto":
        named: torch.dtype = getattr(torch, requested)
        return named
    if not computes_in(device, stored):
        return torch.float32
    return stored


def _count(model: torch.nn.Module) -> tuple[int, float | None]:
    """Number of parameters before compression, and stored bits per weight of the compressed linear layers."""
    from shiftadd_cli.runtime.packed import PackedWeight
    from shiftadd_cli.runtime.table import Table

    # Tied modules share their codes.
    packed = {
        id(module.get_parameter("weight_codes")): module
        for module in model.modules()
        if isinstance(module, PackedWeight)
    }
    stored = {id(module.get_parameter(name)) for module in packed.values() for name in module.layout.tensors()}
    count = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in stored)
    count += sum(module.layout.rows * module.layout.columns for module in packed.values())
    layers = [module.layout for module in packed.values() if not isinstance(module, Table)]
    if not layers:
        return count, None
    weights = sum(layout.rows * layout.columns for layout in layers)
    return count, 8 * sum(layout.nbytes for layout in layers) / weights


def _calibration_of(path: Path) -> dict[str, Any]:
    """The `calibration` of report.json; empty if there is no file, or if the run used no data."""
    file = path / "report.json"
    calibration = _read_json(file).get("calibration") if file.is_file() else None
    return calibration if isinstance(calibration, dict) else {}


def _dtype_of(config: dict[str, Any]) -> torch.dtype:
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ArtifactError(
            f"{file} is not valid JSON ({error}); restore it, or write the checkpoint again."
        ) from error
    return content if isinstance(content, dict) else {}
