"""How much data flows through a model's blocks for one sample, computed before any weight is read."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.blockwise.forward import StopForward, hooked, run_model
from shiftadd_cli.data.images import image_reader
from shiftadd_cli.errors import SourceError, first_line
from shiftadd_cli.source import Source
from shiftadd_cli.source.weight_reads import without_values


@dataclass(frozen=True)
class Flow:
    """`tokens`: tokens that enter each block; `values`: values of a sample's hidden states, at the block with the most;
    `sample_bytes`: bytes stored for the sample itself, if they matter."""

    tokens: tuple[int, ...]
    values: int
    sample_bytes: int = 0


def measure_flow(source: Source, blocks: tuple[str, ...], seq_len: int) -> Flow:
    """The flow of a window of `seq_len` tokens, or of an image, through these blocks.

    Raises:
        SourceError: the model cannot read the output of its image processor.
    """
    if source.reads_images:
        return _image_flow(source, blocks)
    return Flow((seq_len,) * len(blocks), _text_values(source, blocks, seq_len))


@lru_cache(maxsize=1)
def _text_values(source: Source, blocks: tuple[str, ...], seq_len: int) -> int:
    """The number of values in a window's hidden states, which may be several streams (Gemma 3n). The model runs on the
    meta device to find it; where it cannot run there, the configuration gives it."""
    entered: list[int] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        entered.append(states.numel())
        raise StopForward

    model = source.skeleton()
    handle = model.get_submodule(blocks[0]).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with hooked([handle]), without_values():
            run_model(model, torch.zeros(1, seq_len, dtype=torch.long, device="meta"))
    except StopForward:
        return entered[0]
    except Exception:  # code that depends on values can fail in any way without them
        width = getattr(source.config.get_text_config(), "hidden_size", None)
        # The configuration of a model with custom code may use another name for it.
        embedding: Any = model.get_input_embeddings()
        return seq_len * int(width or embedding.embedding_dim)
    raise SourceError(
        f"{type(model).__name__} never calls its first block {blocks[0]}; its architecture is not supported."
    )


# Every choice of bits makes a new plan, and the flow stays the same.
@lru_cache(maxsize=1)
def _image_flow(source: Source, blocks: tuple[str, ...]) -> Flow:
    """Run the model on the meta device, on an empty picture from its image processor, and read the shapes."""
    pixels = image_reader(source).blank()
    model = source.skeleton()
    shapes: list[torch.Size] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        shapes.append(states.shape)
        if len(shapes) == len(blocks):
            raise StopForward

    handles = [model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True) for name in blocks]
    try:
        with hooked(handles), suppress(StopForward), torch.no_grad():
            run_model(model, pixels.unsqueeze(0).to("meta"))
    except Exception as error:  # a model can fail in any way on sizes that do not fit
        size = " x ".join(map(str, pixels.shape))
        reason = first_line(error)
        raise SourceError(
            f"{source.spec} cannot read an image of {size} from its own image processor ({reason}); check "
            "preprocessor_config.json against config.json."
        ) from error
    if len(shapes) != len(blocks) or any(len(shape) != 3 for shape in shapes):
        raise SourceError(
            f"{type(model).__name__} does not pass tokens through its blocks one by one; its architecture is not "
            "supported."
        )
    return Flow(tuple(shape[1] for shape in shapes), max(shape[1] * shape[2] for shape in shapes), pixels.nbytes)
