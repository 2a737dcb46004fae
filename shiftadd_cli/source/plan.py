"""Maps stored tensors to the parameters of a model, from headers alone."""

from __future__ import annotations

import re
from typing import Any

import torch

from shiftadd_cli.device import dtype_name
from shiftadd_cli.errors import SourceError
from shiftadd_cli.source.checkpoint import Checkpoint
from shiftadd_cli.source.unread import refuse_adapter, wrapper


class LoadPlan:
    """Stored names by target: `keys[parameter or persistent buffer]` lists the tensors it is made of; `unread` maps all
    other tensors to the names that they would have in the model.

    Renaming and fusing use the code of transformers (`core_model_loading`), so no architecture that it can load needs
    code of ours.

    Raises:
        SourceError: a parameter of the model has no tensor in the checkpoint, or two, or one of another shape, or one
            that is not stored as floats of at least 16 bits; or the checkpoint holds an adapter.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, transforms: list[Any], name: str) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        own = model.state_dict()
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self.keys: dict[str, list[str]] = {}
        self.unread: dict[str, str] = {}
        # Some renamings act only after another key and keep state, so the order must be that of the loader.
        for key in sorted(checkpoint.tensors, key=dot_natural_key):
            if (own_target := checkpoint.tensors[key].target) is not None:
                self.unread[key] = own_target
                continue
            target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
            if target not in own and key in own:
                target, pattern = rename_source_key(key, [], [], model.base_model_prefix, own)
            if target not in own:
                self.unread[key] = target
                continue
            self._check_numbers(checkpoint, key, own[target], name)
            if pattern is None:
                self._check_plain(checkpoint, key, own[target], target, name)
            for parameter in _all_targets(target, by_pattern.get(pattern) if pattern is not None else None):
                if parameter in own:
                    self.keys.setdefault(parameter, []).append(key)
        refuse_adapter(self.unread, name)
        self._check_complete(model, name)

    def is_stored(self, target: str) -> bool:
        """Whether the checkpoint has the tensors for `target`."""
        return target in self.keys

    def _check_numbers(self, checkpoint: Checkpoint, key: str, parameter: torch.Tensor, name: str) -> None:
        dtype = checkpoint.tensors[key].dtype
        if dtype is None or not parameter.is_floating_point():
            return
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise SourceError(
                f"Tensor {key} of {name} is stored as {dtype_name(dtype)}, so the model is already "
                "quantized; give the original, unquantized model."
            )

    def _check_plain(self, checkpoint: Checkpoint, key: str, parameter: torch.Tensor, target: str, name: str) -> None:
        if target in self.keys:
            raise SourceError(
                f"{name} holds {target} twice, as {self.keys[target][0]} and as {key}; remove the wrong one."
            )
        header = checkpoint.tensors[key]
        if tuple(header.shape) != tuple(parameter.shape) and header.dtype is not None:
            raise SourceError(
                f"Tensor {key} of {name} has shape {list(header.shape)}, but the configuration needs "
                f"{list(parameter.shape)} ({target}); weights and config.json do not belong together."
            )

    def _check_complete(self, model: Any, name: str) -> None:
        from shiftadd_cli.source.skeleton import tied_groups

        present = set(self.keys)
        for group in tied_groups(model):
            if present & set(group):
                present.update(group)
        ignorable = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
        missing = [
            parameter
            for parameter, _ in model.named_parameters(remove_duplicate=False)
            if parameter not in present and not any(pattern.search(parameter) for pattern in ignorable)
        ]
        if missing and (part := wrapper(self.unread)) is not None:
            raise SourceError(
                f"The names of all tensors of {name} contain {part!r}, which a wrapper around the model has added; "
                "save the weights again without it."
            )
        if missing:
            raise SourceError(
                f"{name} lacks {len(missing)} of the tensors {type(model).__name__} needs (first: {missing[0]}); the "
                "checkpoint is incomplete or belongs to another architecture."
            )


def _all_targets(first: str, converter: Any) -> list[str]:
    """`first`, plus the other names if a converter splits one tensor into several parameters."""
    patterns = list(converter.target_patterns) if converter is not None else []
    if len(patterns) < 2 or patterns[0] not in first:
        return [first]
    before, _, after = first.partition(patterns[0])
    return [before + pattern + after for pattern in patterns]
