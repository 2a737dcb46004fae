"""The safetensors files of a model folder as one checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source.checkpoint import TensorHeader, fingerprint_file, same_bytes
from shiftadd_cli.source.safetensors_header import read_header
from shiftadd_cli.storage.safetensors_names import INDEX_FILE, SINGLE_FILE


class SafetensorsFolder:
    """`Checkpoint` over the shards named by an index, or else over `model.safetensors`.

    If both exist, transformers reads the single file and not the shards. Here both must have the same content.
    `fetched`: the folder is a snapshot of a hub model from which the shards were requested; other files in the hub's
    cache do not count.

    Attributes:
        ambiguous: transformers would read another file of the folder.

    Raises:
        SourceError: there are no safetensors; a shard is missing, damaged or outside the folder; a tensor is missing
            from its shard or in two; or a single file differs from the shards.
    """

    def __init__(self, folder: Path, *, fetched: bool = False) -> None:
        index, single = folder / INDEX_FILE, folder / SINGLE_FILE
        self._located: dict[str, Path] = {}
        self._raw: dict[Path, bytes] = {}
        self.tensors: dict[str, TensorHeader] = {}
        placed = read_index(index) if index.is_file() else {}
        shards = sorted(set(placed.values()))
        if single.is_file() and not any((folder / shard).is_file() for shard in shards):
            # An index without any of its shards is a leftover of an earlier save.
            placed, shards = {}, [SINGLE_FILE]
        elif not shards:
            raise _no_safetensors(folder)
        for shard in shards:
            self._add(folder / shard, {name for name, where in placed.items() if where == shard})
        self.files = tuple(self._raw)
        self.ambiguous = single.is_file() and single not in self._raw
        if self.ambiguous and not fetched:
            self._refuse_unless_same(single)

    def _add(self, path: Path, expected: set[str]) -> None:
        if not path.is_file():
            raise SourceError(f"The shard {path} that the index names is missing; download the model again.")
        headers, self._raw[path] = read_header(path)
        absent = sorted(expected - headers.keys())
        if absent:
            raise SourceError(
                f"{path} lacks {len(absent)} tensors that {INDEX_FILE} places in it (first: {absent[0]}); "
                "index and shards are from different versions; download the model again."
            )
        # transformers reads all tensors of a shard, including those that the index does not list.
        for name, header in headers.items():
            if name in self._located:
                raise SourceError(
                    f"The tensor {name} is in {self._located[name]} and in {path}; download the model again, or remove "
                    "the file left over from another version."
                )
            self.tensors[name] = header
            self._located[name] = path

    def _refuse_unless_same(self, single: Path) -> None:
        """Refuse a single file in addition to shards unless both hold the same tensors, to the last byte."""
        headers, _ = read_header(single)
        same = headers == self.tensors
        if same:
            from safetensors import safe_open

            with safe_open(single, framework="pt", backend="pread") as other, self.opened(headers) as own:
                same = all(same_bytes(own[name][...], other.get_tensor(name)) for name in headers)
        if not same:
            raise SourceError(
                f"{single.parent} holds {SINGLE_FILE} and, with other content, the shards of {INDEX_FILE}; remove the "
                "one left over from another version."
            )

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The float dtype of most stored numbers."""
        numbers: Counter[torch.dtype] = Counter()
        for header in self.tensors.values():
            if header.dtype is not None and header.dtype.is_floating_point:
                numbers[header.dtype] += torch.Size(header.shape).numel()
        return numbers.most_common(1)[0][0] if numbers else None

    def fingerprint(self, digest: Any) -> None:
        """Add the identity of every file to `digest`."""
        for path, raw in self._raw.items():
            fingerprint_file(digest, path, raw)

    def loader(self, model: Any, dtype: torch.dtype) -> tuple[list[Any], Any]:
        """The transforms of transformers for a checkpoint of this model; no quantizer."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        return list(get_model_conversion_mapping(model)), None

    @contextmanager
    def opened(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Lazy slices of the named tensors.

        The files are read, not mapped. Mapped pages would count as resident as long as any tensor of the file lives, so
        resident memory would grow towards the size of the model.
        """
        from safetensors import SafetensorError, safe_open

        with ExitStack() as stack:
            handles: dict[Path, Any] = {}
            lazy: dict[str, Any] = {}
            try:
                for name in names:
                    path = self._located[name]
                    if path not in handles:
                        handles[path] = stack.enter_context(safe_open(path, framework="pt", backend="pread"))
                    lazy[name] = handles[path].get_slice(name)
                yield lazy
            except SafetensorError as error:
                raise OSError(str(error)) from error


def read_index(index: Path) -> dict[str, str]:
    """Shard file name by tensor name, from the index; every file name is checked to be inside the folder."""
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = [(name, where) for name, where in placed.items() if isinstance(where, str)]
        complete = len(entries) == len(placed) > 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{index} is not a valid index of safetensors shards; download it again.") from error
    if not complete:
        raise SourceError(f"{index} does not name any shards, or has entries that are not names; download it again.")
    for _, where in entries:
        parts = PurePosixPath(where.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in where or "\0" in where:
            raise SourceError(f"{index} names a file outside its folder ({where!r}); do not use this checkpoint.")
    return dict(entries)


def _no_safetensors(folder: Path) -> SourceError:
    if pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        return SourceError(
            f"{folder} holds only pickled weights ({pickled[0].name}), which can run code when opened; convert them "
            "first, in Python: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
        )
    if ggufs := sorted(folder.glob("*.gguf")):
        return SourceError(
            f"{folder} holds no safetensors weights; to read {ggufs[0].name}, give the path of that file."
        )
    return SourceError(f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there.")
