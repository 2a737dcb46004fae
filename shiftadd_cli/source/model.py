"""A model as a source of weights: its skeleton, its parts on demand, its tokenizer or image processor."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shiftadd_cli.device import computes_in, dtype_name
from shiftadd_cli.source.checkpoint import Checkpoint
from shiftadd_cli.source.companions import copy_companions, write_generation_settings, write_tokenizer
from shiftadd_cli.source.config_file import merged_config, set_dtype
from shiftadd_cli.source.experts import split_experts
from shiftadd_cli.source.gguf_checkpoint import open_gguf
from shiftadd_cli.source.gguf_header import GgufFile
from shiftadd_cli.source.image_processor import load_image_processor
from shiftadd_cli.source.loading import Loader, covered
from shiftadd_cli.source.safetensors_folder import SafetensorsFolder
from shiftadd_cli.source.skeleton import build_skeleton
from shiftadd_cli.source.tokenizer import load_tokenizer
from shiftadd_cli.source.unread import without_prediction
from shiftadd_cli.source.vision import IMAGE_INPUT

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class Source:
    """A model on disk whose headers have been read; made by `open_source`.

    Attributes:
        spec: the model as the user typed it; name: a short form of it for file names and titles.
        path: the model folder or .gguf file.
        config: the configuration of the model, with its dtype set and without any quantization entry.
        dtype: dtype of activations and of everything that is not quantized.
        fingerprint: sha256 (hex) over the configuration and, for every weight file, its name, size, header and 256
            sampled pages; the location of the folder and time stamps do not count.
        remote_code: whether model code from the checkpoint is run.
        file_bytes: size of the weight files.
        left_behind: parts of the checkpoint that the model does not read.
        model_bytes: size of all parameters at `dtype`, with tied ones counted once.
    """

    def __init__(
        self,
        *,
        spec: str,
        name: str,
        path: Path,
        config: PreTrainedConfig,
        model_class: Any,
        weights: Checkpoint | GgufFile,
        dtype: torch.dtype,
        fingerprint: str,
        remote_code: bool,
        fields: dict[str, Any],
    ) -> None:
        self.spec, self.name, self.path, self.dtype, self.fingerprint = spec, name, path, dtype, fingerprint
        self._model_class, self._weights, self.remote_code = model_class, weights, remote_code
        self._fields = fields
        if not remote_code and hasattr(config, "auto_map"):
            # The code that it names is neither run nor copied.
            del config.auto_map
        self._in_float32: Source | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._image_processor: Any = None
        self._skeleton, self._loader = self._fresh(config, dtype)
        self.left_behind = self._loader.left_behind
        self._experts = split_experts(self._skeleton)
        self.config: PreTrainedConfig = copy.deepcopy(self._skeleton.config)
        files = tuple(weights.headers) if isinstance(weights, GgufFile) else weights.files
        self.file_bytes = sum(file.stat().st_size for file in files)
        self.model_bytes = sum(weight.numel() * weight.element_size() for weight in self._skeleton.parameters())

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device, in evaluation mode, with tied weights and with the experts of a mixture split
        into linears; always the same object."""
        return self._skeleton

    def materialise(self, prefixes: Sequence[str]) -> None:
        """Load every parameter and buffer at or below these module (or tensor) names into the skeleton.

        Parameters get `dtype`, except those that transformers keeps in float32. Buffers that no file stores are
        computed. Tensors already in memory stay unchanged. Tied parameters are loaded together, once.

        Raises:
            SourceError: the files changed since they were opened, or do not match the model.
        """
        # Files are read into stacks, because transformers can only fill those.
        owners = [next((name for name in self._experts if part.startswith(f"{name}.")), part) for part in prefixes]
        with ExitStack() as stack:
            for name, experts in self._experts.items():
                if covered(name, owners) and experts.is_empty:
                    stack.enter_context(experts.as_stacks())
            self._loader.materialise(owners)

    def release(self, prefixes: Sequence[str]) -> None:
        """Move everything at or below these names back to meta, and tied parameters under all their names."""
        self._loader.release(prefixes)

    def at(self, dtype: torch.dtype) -> Source:
        """The same files at another dtype: a source with its own skeleton, with nothing in memory."""
        return Source(
            spec=self.spec,
            name=self.name,
            path=self.path,
            config=self.config,
            model_class=self._model_class,
            weights=self._weights,
            dtype=dtype,
            fingerprint=self.fingerprint,
            remote_code=self.remote_code,
            fields=self._fields,
        )

    def computed_on(self, device: torch.device) -> Source:
        """The source to run on `device`: this one, or one at float32 if the device has no instructions for its dtype.
        There float32 is several times as fast. Always returns the same object."""
        if computes_in(device, self.dtype):
            return self
        if self._in_float32 is None:
            self._in_float32 = self.at(torch.float32)
        return self._in_float32

    @property
    def reads_images(self) -> bool:
        """Whether this is a vision model, not a language model."""
        main_input: str = self._skeleton.main_input_name
        return main_input == IMAGE_INPUT

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, read once.

        Raises:
            SourceError: there is none, or it cannot be read.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path, remote_code=self.remote_code)
        return self._tokenizer

    def load_image_processor(self) -> Any:
        """The image processor of a vision model, read once.

        Raises:
            SourceError: there is none, or it cannot be read.
        """
        if self._image_processor is None:
            self._image_processor = load_image_processor(self.path)
        return self._image_processor

    def save_companions(self, folder: Path) -> None:
        """Write the tokenizer or image processor and other small files, all but weights and configuration, to `folder`.

        Files of a model folder are copied unchanged. Only the tokenizer of a GGUF file is newly written.
        """
        if isinstance(self._weights, GgufFile):
            write_tokenizer(self.load_tokenizer(), folder)
        else:
            copy_companions(self.path, folder, code=self.remote_code)
        if not self.reads_images:
            write_generation_settings(self.config, folder)

    def config_fields(self) -> dict[str, Any]:
        """Fields of config.json: those of the source, plus those of the installed transformers."""
        fields = merged_config(self._fields, self.config)
        fields["architectures"] = [type(self._skeleton).__name__]
        set_dtype(fields, dtype_name(self.dtype))
        return fields

    def load_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The whole model in memory on the CPU, in evaluation mode, at `dtype` (default: that of the source)."""
        dtype = dtype or self.dtype
        weights = self._weights
        # from_pretrained would leave a quantization entry that prevents saving the model, or would read other files.
        if isinstance(weights, GgufFile) or (isinstance(weights, SafetensorsFolder) and weights.ambiguous):
            model, loader = self._fresh(self.config, dtype)
            loader.materialise([""])
            return model
        model = self._model_class.from_pretrained(
            self.path, config=self.config, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        return model.requires_grad_(False)

    def _fresh(self, config: Any, dtype: torch.dtype) -> tuple[Any, Loader]:
        model = build_skeleton(self._model_class, config, dtype)
        weights = self._weights
        checkpoint = open_gguf(weights, model.config, model) if isinstance(weights, GgufFile) else weights
        loader = Loader(model, checkpoint, dtype, self.spec)
        if loader.untied:
            model.config.tie_word_embeddings = False
        without_prediction(model.config, loader.left_behind)
        return model, loader
