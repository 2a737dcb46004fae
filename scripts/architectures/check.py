"""Runs one architecture through the real product: quantizes it, loads it again, and compares with its own forward."""

from __future__ import annotations

import json
import random
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from architectures import factory
from architectures.factory import Architecture
from architectures.listening import Heard, first_tensor, listening
from architectures.shrinking import SPECIAL, VOCAB_SIZE

Status = Literal["right", "partial", "refused", "broken", "not built"]

WINDOW = 24
_BATCHES, _BATCH = 3, 2
_SETTINGS = [
    "--recipe", "equal-bits", "--bits", "3", "--samples", str(_BATCHES * _BATCH), "--batch-size", str(_BATCH),
]  # fmt: skip
_TEXT = ["--seq-len", str(WINDOW)]
# Relative errors. Inputs of a block come from the same operations; logits come from packed and dense weights, which are
# multiplied in a different order.
_SAME_INPUTS, _SAME_LOGITS = 1e-4, 1e-3
# A model with a smaller compressed share is partial.
_MOST = 0.5


@dataclass(frozen=True)
class Outcome:
    """The outcome of one architecture.

    Attributes:
        share: the compressed part of the weights of all linear layers; None if nothing was compressed.
        note: the sentence of a refusal, or the fault.
        seconds: wall-clock time.
    """

    name: str
    model_type: str
    status: Status
    share: float | None = None
    note: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields for a line of JSON."""
        return asdict(self)


class _WrongError(Exception):
    """The product reported no error, but its result is wrong."""


def check(architecture: Architecture, folder: Path) -> Outcome:
    """Build, quantize and compare one architecture; `folder` is empty and receives all files."""
    source, out = folder / "model", folder / "out"
    try:
        factory.save(architecture, source)
        original = _load(architecture, source)
    except Exception as error:
        return _outcome(architecture, "not built", note=_last_line(error))
    window = _window(architecture, original)
    try:
        logits = _logits(architecture, original, window)
        alone = f"its own logits are {'' if bool(torch.isfinite(logits).all()) else 'not '}finite"
        if _error(_logits(architecture, _load(architecture, source), window), logits) > 0:
            alone = "transformers gives other logits each time it is loaded"
    except Exception as error:
        # A model that needs more inputs than tokens or pictures must be refused.
        alone = f"it does not run on {'pictures' if architecture.reads_images else 'tokens'} alone: {_last_line(error)}"
    data = _write_pictures(folder) if architecture.reads_images else _write_text(folder)
    arguments = ["quantize", str(source), "-o", str(out), *_SETTINGS, "--calibration", str(data)]
    try:
        with listening() as heard:
            refusal = _run([*arguments, *(() if architecture.reads_images else _TEXT)])
        if refusal is not None:
            return _outcome(architecture, "refused", note=refusal.replace(str(source), "MODEL"))
        if alone != "its own logits are finite":
            raise _WrongError(f"the model was not refused although {alone}")
        dense_folder = folder / "dense"
        refusal = _run(["export", str(out), "--format", "dense", "-o", str(dense_folder)])
        if refusal is not None:
            raise _WrongError(f"the result cannot be exported: {refusal}")
        compressed = {layer["name"]: layer["out_features"] * layer["in_features"] for layer in _layers(out)}
        share = sum(compressed.values()) / _linear_weights(original)
        dense = _load(architecture, dense_folder)
        _compare_names(original, dense)
        _compare_kept(original, dense, out)
        _compare_inputs(architecture, original, heard, list(compressed))
        _compare_logits(architecture, dense, out)
    except _WrongError as error:
        return _outcome(architecture, "broken", note=str(error))
    except Exception as error:
        return _outcome(architecture, "broken", note=f"exception: {_last_line(error)}")
    if share < _MOST:
        return _outcome(architecture, "partial", share, note="")
    return _outcome(architecture, "right", share)


def _outcome(architecture: Architecture, status: Status, share: float | None = None, note: str = "") -> Outcome:
    return Outcome(architecture.name, architecture.model_type, status, share, " ".join(note.split()))


def _run(arguments: list[str]) -> str | None:
    """Run a verb as the command line does. Returns the sentence of a refusal, or None; other exceptions propagate."""
    import click

    from shiftadd_cli.cli import main

    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            main.main(arguments, standalone_mode=False)
    except click.ClickException as error:
        if error.exit_code != 2:
            raise
        return error.format_message()
    return None


def _last_line(error: BaseException) -> str:
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages/torch" not in frame.filename
    ]
    line = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).strip()[:300]}{line}"


def _load(architecture: Architecture, folder: Path) -> Any:
    import transformers

    model_class = getattr(transformers, architecture.name)
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[kind])):
            raise _WrongError(f"{len(names)} {kind.replace('_', ' ')} in {folder.name}, such as {names[0]}")
    return model.eval()


def _window(architecture: Architecture, model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if not architecture.reads_images:
        return torch.randint(SPECIAL, VOCAB_SIZE, (2, WINDOW), generator=generator)
    size = factory.image_size(model.config)
    return torch.randn(2, 3, size, size, generator=generator)


@torch.no_grad()
def _logits(architecture: Architecture, model: Any, batch: Tensor) -> Tensor:
    if architecture.reads_images:
        output = model(**{model.main_input_name: batch})
        logits = getattr(output, "logits", None)
        # One class returns its class scores under another name.
        return (output.last_hidden_state if logits is None else logits).float()
    return model(input_ids=batch, use_cache=False).logits.float()


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def _layers(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "report.json").read_text())["layers"]


def _linear_weights(model: Any) -> int:
    """Weights of all linear layers except the output head: matrices and stacks of matrices, without embeddings and
    convolutions."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tables = (nn.Embedding, nn.EmbeddingBag)
    counted = {id(matrix) for module in model.modules() if isinstance(module, tables) for matrix in module.parameters()}
    total = 0
    for module in model.modules():
        if module is head or isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        for name, weight in module.named_parameters(recurse=False):
            is_matrix = weight.ndim == 2 and (name == "weight" or name.endswith("proj"))
            is_stack = weight.ndim == 3 and min(weight.shape) > 1
            if (is_matrix or is_stack) and id(weight) not in counted:
                # Modules may share a weight.
                counted.add(id(weight))
                total += weight.numel()
    return total


def _compare_names(original: Any, dense: Any) -> None:
    before, after = set(original.state_dict()), set(dense.state_dict())
    if changed := sorted(before ^ after):
        raise _WrongError(f"the dense export has different tensors than the source, such as {changed[0]}")


def _compare_inputs(architecture: Architecture, original: Any, heard: Heard, compressed: list[str]) -> None:
    """Check that calibration has seen every input of a compressed layer of the original.

    The product may run its model on other batches too, such as those of a check of its own, so three must be right.
    """
    names = list(dict.fromkeys(_present(original, layer) for layer in compressed))
    worst: list[tuple[float, str, int]] = []
    for number, batch in enumerate(batch for batch in heard.batches if len(batch) == _BATCH):
        errors = [
            (heard.distance(tensor.float()), name, number)
            for name, tensor in _inputs(architecture, original, batch, names).items()
        ]
        # The first wrong input, not the worst: it causes the errors after it.
        worst.append(next((error for error in errors if error[0] > _SAME_INPUTS), (0.0, "", number)))
    if len(worst) < _BATCHES:
        raise _WrongError(f"calibration ran {len(worst)} of {_BATCHES} batches through the model")
    error, name, number = sorted(worst)[_BATCHES - 1]
    if error:
        raise _WrongError(
            f"calibration never gave {name} the input of the model's own forward (batch {number}, off by {error:.1%})"
        )


def _inputs(architecture: Architecture, model: Any, batch: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Inputs of the modules `names` when a batch runs through the model; modules that do not run are left out."""
    seen: dict[str, Tensor] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (given := first_tensor(args, kwargs)) is not None:
            seen[name] = given.clone()

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
        )
        for name in names
    ]
    _logits(architecture, model, batch)
    for handle in handles:
        handle.remove()
    return seen


def _compare_kept(original: Any, dense: Any, out: Path) -> None:
    """Check that the tensors that belong to no layer and no table are those of the source."""
    report = json.loads((out / "report.json").read_text())
    tables = {f"{name}.weight" for table in report["tables"] for name in table["modules"]}
    changed = tuple({f"{_present(original, layer['name'])}." for layer in report["layers"]})
    before, after = original.state_dict(), dense.state_dict()
    tied = {before[name].data_ptr() for name in tables}
    # A weight that several layers share is reported once.
    compressed = {tensor.data_ptr() for name, tensor in before.items() if name.startswith(changed)}
    for name, tensor in before.items():
        if tensor.data_ptr() not in tied | compressed and not torch.equal(tensor, after[name]):
            raise _WrongError(f"{name} is not compressed, but its values differ from the source")


def _present(model: nn.Module, name: str) -> str:
    """The module `name`, or its nearest existing parent if the model has no such module (experts in stacks)."""
    names = {module for module, _ in model.named_modules()}
    while name not in names:
        name = name.rpartition(".")[0]
    return name


def _compare_logits(architecture: Architecture, dense: Any, out: Path) -> None:
    """Compare the result, loaded as a user would, with its dense export."""
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    loader = AutoModelForImageClassification if architecture.reads_images else AutoModelForCausalLM
    packed = loader.from_pretrained(out).eval()
    if type(packed).__name__ != type(dense).__name__:
        raise _WrongError(f"the result loads as {type(packed).__name__}")
    window = _window(architecture, dense)
    actual, expected = _logits(architecture, packed, window), _logits(architecture, dense, window)
    for source, logits in (("dense export", expected), ("result", actual)):
        if not bool(torch.isfinite(logits).all()):
            raise _WrongError(f"logits of the {source} are not finite")
    if (error := _error(actual, expected)) > _SAME_LOGITS:
        raise _WrongError(f"logits of the result differ from those of its dense export by {error:.1%}")


_WORDS = ("alpha", "beta", "gamma", "delta", "matrix", "plane", "scale", "shift", "binary", "token", "layer", "river")


def _words() -> Iterator[str]:
    draw = random.Random(0)
    for _ in range(200):
        yield " ".join(draw.choice(_WORDS) for _ in range(12))


def _write_text(folder: Path) -> Path:
    (folder / "calibration.txt").write_text("\n".join(_words()))
    return folder / "calibration.txt"


def _write_pictures(folder: Path) -> Path:
    import numpy as np
    from PIL import Image

    pictures = folder / "pictures"
    pictures.mkdir()
    draw = np.random.default_rng(0)
    for number in range(8):
        coarse = draw.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 36)).save(pictures / f"{number}.png")
    return pictures
