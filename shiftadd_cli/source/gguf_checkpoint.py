"""The tensors of a GGUF file as one checkpoint, decoded one by one on demand.

transformers 5 reads GGUF in two ways: lazily with weight transforms for some architectures, and with an older loader
that decodes the whole file into memory. `open_gguf` uses the first if it exists. For other architectures it runs the
per-tensor steps of the older loader lazily, so that none needs the whole model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source.checkpoint import TensorHeader, fingerprint_file
from shiftadd_cli.source.gguf_header import GgufFile, GgufTensor
from shiftadd_cli.source.gguf_rope import ROPE_TENSORS


class _GgufBase:
    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.files: tuple[Path, ...] = tuple(file.headers)
        self.tensors: dict[str, TensorHeader] = {
            t.name: TensorHeader(t.shape, t.dtype, t.nbytes) for t in file.tensors if t.name not in ROPE_TENSORS
        }

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The float dtype that the file was written in; None if it holds quantized blocks."""
        return self._file.stored_dtype

    def fingerprint(self, digest: Any) -> None:
        """Add the identity of every file to `digest`."""
        for path, raw in self._file.headers.items():
            fingerprint_file(digest, path, raw)


class TransformGguf(_GgufBase):
    """A file whose architecture transformers maps with weight transforms; `tensors` has the file's own names."""

    def __init__(self, file: GgufFile, config: Any) -> None:
        super().__init__(file)
        self._config = config

    def loader(self, model: Any, dtype: torch.dtype) -> tuple[list[Any], Any]:
        """The architecture's transforms, plus decoding and casting to `dtype`, and their quantizer."""
        from transformers import GgufConfig
        from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, get_gguf_plan
        from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

        quantizer = GgufHfQuantizer(GgufConfig(dequantize=True))
        quantizer.supported, quantizer.dtype = True, dtype
        quantizer.header = self._header(self._file.tensors)
        quantizer.mapping = get_gguf_conversion_mapping(self._file.architecture, self._config)
        quantizer.quantized, _, _ = get_gguf_plan(quantizer.header, quantizer.mapping)
        return list(quantizer.update_weight_conversions([], model)), quantizer

    @contextmanager
    def opened(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Lazy tensors of the file; quantized ones are raw blocks, which the transforms decode."""
        from transformers.integrations.gguf.reader import load_gguf_state_dict

        lazy: dict[str, Any] = {}
        for path in self.files:
            lazy |= load_gguf_state_dict(self._header([t for t in self._file.tensors if t.path == path], path))
        yield {name: lazy[name] for name in names}

    def _header(self, tensors: Sequence[GgufTensor], path: Path | None = None) -> Any:
        """The headers read so far, in the form of transformers."""
        from transformers.integrations.gguf.reader import GgufHeader, TensorInfo

        infos = tuple(TensorInfo(t.name, t.shape, t.kind, t.offset, t.nbytes) for t in tensors)
        return GgufHeader(str(path or self._file.path), self._file.architecture, infos, 0)


class StepwiseGguf(_GgufBase):
    """A file that only the older loader of transformers supports; `tensors` has the model's names.

    A tensor is decoded through float32, so the largest one briefly takes four bytes per number.
    """

    def __init__(self, file: GgufFile, config: Any, model: Any) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        super().__init__(file)
        self._processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config.to_dict())
        try:
            self._targets: dict[str, str] = names_in_model(model, self._processor)
        except NotImplementedError as error:
            raise SourceError(
                f"{file.path} holds the architecture {file.architecture!r}, whose tensors cannot be mapped to a model; "
                "give the model as a safetensors folder."
            ) from error
        self._parts: dict[str, list[GgufTensor]] = {}
        for tensor in file.tensors:
            if (target := self._target(tensor.name)) is not None:
                self._parts.setdefault(target, []).append(tensor)
        # Shapes come from the model, because only the older loader's code knows how it changes a tensor.
        own = model.state_dict()
        self.tensors = {
            name: TensorHeader(tuple(own[name].shape), None, sum(part.nbytes for part in parts))
            for name, parts in self._parts.items()
            if name in own
        }
        for tensor in file.tensors:
            if tensor.name not in ROPE_TENSORS and self._target(tensor.name) not in own:
                target = self._sibling_name(tensor.name)
                self.tensors[tensor.name] = TensorHeader(tensor.shape, tensor.dtype, tensor.nbytes, target)

    def _target(self, name: str) -> str | None:
        # The processor maps stacked experts by a bare name that it extracts; two of them (gate, up) share one target.
        experts = getattr(self._processor, "GGUF_MOE_WEIGHTS_PATTERN", None)
        match = experts.fullmatch(name) if experts is not None else None
        return self._targets.get(match.groupdict().get("name", name) if match else name)

    def _sibling_name(self, name: str) -> str:
        """The name in the model for a tensor that it lacks: next to tensors with the same prefix in the file."""
        parts = name.split(".")
        for depth in range(len(parts) - 1, 0, -1):
            siblings = [
                target.split(".")[:-1]
                for stored, target in self._targets.items()
                if stored.split(".")[:depth] == parts[:depth] and target in self._parts
            ]
            if siblings:
                common = takewhile(lambda column: len(set(column)) == 1, zip(*siblings, strict=False))
                return ".".join([*(column[0] for column in common), *parts[depth:]])
        return name

    def loader(self, model: Any, dtype: torch.dtype) -> tuple[list[Any], Any]:
        """The transforms of transformers for a checkpoint with the model's own names; no quantizer."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        return list(get_model_conversion_mapping(model)), None

    @contextmanager
    def opened(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Lazy tensors by the model's names; float32 when read, in the layout of the model."""
        yield {name: _LazyDecoded(partial(self._decode, name)) for name in names}

    def _decode(self, name: str) -> torch.Tensor:
        import numpy as np
        from gguf import dequantize
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        written: dict[str, torch.Tensor] = {}
        for part in self._parts[name]:
            kind = GGMLQuantizationType(part.kind)
            data = np.fromfile(part.path, dtype=np.uint8, count=part.nbytes, offset=part.offset)
            if data.size != part.nbytes:
                raise OSError(f"{part.path} has been shortened")
            per_block, block_bytes = GGML_QUANT_SIZES[kind]
            rows = data.reshape(*part.shape[:-1], part.shape[-1] // per_block * block_bytes)
            if kind == GGMLQuantizationType.F32:
                rows = rows.view(np.float32)
            elif kind == GGMLQuantizationType.F16:
                rows = rows.view(np.float16)
            numbers = dequantize(rows, kind).reshape(part.shape)
            result = self._processor.process(
                weights=numbers,
                name=part.name,
                tensor_key_mapping=self._targets,
                parsed_parameters={"tensors": written},
            )
            if result.name is not None:
                return torch.from_numpy(np.ascontiguousarray(result.weights)).float()
        return written[name].float()


class _LazyDecoded:
    def __init__(self, decode: Callable[[], torch.Tensor]) -> None:
        self._decode = decode

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._decode()[index]


def names_in_model(model: Any, processor: Any) -> dict[str, str]:
    """The model's parameter name by GGUF name, as the older loader of transformers maps them.

    That loader tries the names relative to every module and builds a table of names for each, which takes seconds.
    Here it sees all names at once, with one leading component less each time (models are stored with or without their
    outer wrapper). As in that loader, earlier matches win.
    """
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    targets: dict[str, str] = {}
    remaining = {name: name for name in model.state_dict()}
    while remaining:
        view = _NameView(model.config, remaining)
        for gguf_name, shown in get_gguf_hf_weights_map(view, processor).items():
            targets.setdefault(gguf_name, remaining.get(shown, shown))
        shortened: dict[str, str] = {}
        for shown, full in remaining.items():
            if "." in shown:
                shortened.setdefault(shown.partition(".")[2], full)
        remaining = shortened
    return targets


class _NameView:
    """The part of a model that the older loader's mapping reads."""

    def __init__(self, config: Any, names: dict[str, str]) -> None:
        self.config, self._names = config, names

    def state_dict(self) -> dict[str, str]:
        return self._names

    def named_children(self) -> tuple[()]:
        return ()


def open_gguf(file: GgufFile, config: Any, model: Any) -> TransformGguf | StepwiseGguf:
    """The checkpoint in a GGUF file for `model`, a skeleton on meta built from `config`.

    Raises:
        SourceError: its tensors cannot be mapped to the model.
    """
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    if is_gguf_arch_supported(file.architecture):
        return TransformGguf(file, config)
    return StepwiseGguf(file, config, model)
