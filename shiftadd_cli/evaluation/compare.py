"""`evaluate`: measure models on a text or on images, from model names to a result that can be written as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shiftadd_cli.data.text import TextData, check_tokens, load_text, text_windows, tokenise
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.errors import CalibrationError, RecipeError
from shiftadd_cli.evaluation.compare_images import ImageEvaluation, evaluate_images
from shiftadd_cli.evaluation.perplexity import Score, score_models
from shiftadd_cli.evaluation.result import ModelResult
from shiftadd_cli.runtime.opened import Loaded, Opened, open_any
from shiftadd_cli.source.positions import window_length
from shiftadd_cli.source.tokenizer import leading_tokens, tokens_as_text

DEFAULT_CONTEXT = 512
_SAMPLE_CHARACTERS = 20_000


@dataclass(frozen=True)
class Evaluation:
    """Models measured on one text.

    Attributes:
        text, text_fingerprint: name and SHA-256 of the test text.
        context: tokens per window; windows: number of windows; tokens: number of tokens used; text_tokens: number of
            tokens in the full text.
        positions: the smallest position limit of the models; None if none has a limit.
        window_start: special tokens that the tokenizer puts before a text and every window begins with; may be "".
        scored_tokens: number of predicted tokens, over which all means are taken; `window_start` is not predicted.
        device: device of the computation.
        original: the model that the others are compared with, if given.
        models: in the order given.
    """

    text: str
    text_fingerprint: str
    text_tokens: int
    tokens: int
    scored_tokens: int
    context: int
    positions: int | None
    window_start: str
    windows: int
    device: str
    original: ModelResult[Score] | None
    models: tuple[ModelResult[Score], ...]

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as JSON types; each model is one flat table of its `info` and `score`."""
        models = [model.to_dict() for model in self.models]
        return asdict(self) | {"original": self.original and self.original.to_dict(), "models": models}


def evaluate(
    models: Sequence[str],
    *,
    against: str | None = None,
    dataset: str = "builtin",
    context: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: torch.device | None = None,
    max_images: int | None = None,
    show_progress: bool = True,
    trust_remote_code: bool = False,
    team: Team = ALONE,
) -> Evaluation | ImageEvaluation:
    """Measure each model's perplexity on the test split of a text, and its distance from an original.

    Vision models are measured on images, see `evaluate_images`. The text is tokenised as one string, and its first
    `max_tokens` tokens are used. It is cut into windows that begin with the special tokens that the tokenizer puts
    before a text, see `text_windows`; the measures are those of `score_models`. All models are in memory at once, so
    that they see the same batches and the original runs once.

    Args:
        models: names of originals or of shiftadd checkpoints, see `open_any`.
        against: name of the original; None omits divergence and agreement.
        dataset: see `load_text`, and `load_images` for vision models.
        context: tokens per window; by default 512, or the models' position limit if that is smaller.
        trust_remote_code: run model code that ships with a model.
        team: its processes share the windows of a text; each process loads all models.

    Raises:
        ShiftaddError: a problem with a model, the text or the context, or models that split text differently.
    """
    device = device or torch.device("cpu")
    everyone = ([] if against is None else [against]) + list(models)
    opened = [open_any(spec, trust_remote_code=trust_remote_code) for spec in everyone]
    if any(model.reads_images for model in opened):
        _refuse_mixture(opened)
        if team.size > 1:
            raise RecipeError("Evaluation on images runs in one process; run this without torchrun.")
        return evaluate_images(
            opened,
            compared=against is not None,
            dataset=dataset,
            max_images=max_images,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            show_progress=show_progress,
        )
    limits = {model.spec: model.positions for model in opened}
    length = window_length(context, DEFAULT_CONTEXT, limits, "`context`")
    tokenizers = [(model.spec, model.load_tokenizer()) for model in opened]
    text = load_text(dataset, split="test", tokenizer=tokenizers[0][1])
    tokenizer = _common_tokenizer(tokenizers, text)
    tokens = tokenise(text.text, tokenizer)
    used = tokens[:max_tokens]
    windows = text_windows(used, tokenizer, length, "`context`")
    if not windows.scored_tokens:
        raise CalibrationError(f"{text.name} has {len(tokens)} tokens, and 2 are needed; give a longer text.")
    for model in opened:
        check_tokens(windows, tokenizer, model.vocab_size, data=text.name, model=model.spec)
    loaded = [model.load(dtype, device) for model in opened]
    pairs = [(model.info.spec, model.model) for model in loaded]
    first = 0 if against is None else 1
    scores, original_score = score_models(
        pairs[first:],
        windows,
        batch_size=batch_size,
        original=pairs[0] if first else None,
        show_progress=show_progress,
        team=team,
    )
    return Evaluation(
        text=text.name,
        text_fingerprint=text.fingerprint,
        text_tokens=len(tokens),
        tokens=len(used),
        scored_tokens=windows.scored_tokens,
        context=length,
        positions=min((limit for limit in limits.values() if limit is not None), default=None),
        window_start=tokens_as_text(tokenizer, windows.prefix),
        windows=len(windows.lengths),
        device=str(device),
        original=None if original_score is None else _measured(loaded[0], original_score, text),
        models=tuple(_measured(model, score, text) for model, score in zip(loaded[first:], scores, strict=True)),
    )


def _refuse_mixture(opened: Sequence[Opened]) -> None:
    for other in opened:
        if other.reads_images != opened[0].reads_images:
            reads = {model.reads_images: model.spec for model in (opened[0], other)}
            raise RecipeError(
                f"{reads[True]} reads images and {reads[False]} reads text, so they cannot be compared; evaluate them "
                "one by one."
            )


def _measured(loaded: Loaded, score: Score, text: TextData) -> ModelResult[Score]:
    return ModelResult(loaded.info, score, loaded.info.was_calibrated_on(text.fingerprint))


def _common_tokenizer(tokenizers: list[tuple[str, Any]], text: TextData) -> Any:
    """The first tokenizer, if all split the beginning of the text alike; otherwise per-token numbers mean nothing."""
    name, tokenizer = tokenizers[0]
    sample = text.text[:_SAMPLE_CHARACTERS]
    expected = tokenise(sample, tokenizer)
    for other, candidate in tokenizers[1:]:
        starts = [leading_tokens(one) for one in (tokenizer, candidate)]
        if starts[0] != starts[1]:
            named = [
                tokens_as_text(one, ids) or "nothing" for one, ids in zip((tokenizer, candidate), starts, strict=True)
            ]
            raise RecipeError(
                f"The tokenizer of {name} puts {named[0]} before a text and that of {other} {named[1]}, so their "
                "numbers cannot be compared; evaluate them one by one."
            )
        if not torch.equal(tokenise(sample, candidate), expected):
            raise RecipeError(
                f"{other} and {name} split text into different tokens, so their numbers cannot be compared; "
                "evaluate them one by one."
            )
    return tokenizer
