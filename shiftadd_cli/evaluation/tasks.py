"""Zero-shot and few-shot tasks of lm-evaluation-harness, run on the model objects directly.

Models run one after another, all on the same requests. Prompts, metrics and standard errors are those of the harness.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from shiftadd_cli.data.text import check_tokens
from shiftadd_cli.errors import CalibrationError, RecipeError, first_line
from shiftadd_cli.runtime.opened import Loaded, ModelInfo, open_any
from shiftadd_cli.source.positions import position_limit

# ShiftAddLLM (arXiv:2406.05981), section 5.1: ARC (challenge, easy), BoolQ, COPA, PIQA, RTE, StoryCloze and MMLU.
PAPER_TASKS = ("arc_challenge", "arc_easy", "boolq", "copa", "piqa", "rte", "storycloze_2016", "mmlu")
PRESETS: Mapping[str, tuple[str, ...]] = {"paper": PAPER_TASKS}


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task or group of tasks.

    Attributes:
        task, metric: the harness's names.
        filter: the harness's filter of the output before the metric; "none" for no filter.
        value, error: the metric and its standard error; the error is None if the harness gives none.
        samples: number of documents that the metric is a mean over.
        version: version of the task's definition.
        higher_is_better: None if the task does not specify it.
    """

    task: str
    metric: str
    filter: str
    value: float
    error: float | None
    samples: int
    version: str
    higher_is_better: bool | None


@dataclass(frozen=True)
class ModelTasks:
    """Scores of one model, in the order of the requested tasks, and the seconds it took."""

    info: ModelInfo
    scores: tuple[TaskScore, ...]
    seconds: float


@dataclass(frozen=True)
class TaskEvaluation:
    """Scores of several models on the same requests."""

    models: tuple[ModelTasks, ...]
    tasks: tuple[str, ...]
    fewshot: int | None
    limit: int | None
    device: str
    harness: str

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as JSON types."""
        return asdict(self)


def task_names(text: str) -> tuple[str, ...]:
    """The comma-separated names in `text`, with presets expanded. Raises CalibrationError if there are none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    tasks = dict.fromkeys(task for name in names for task in PRESETS.get(name, (name,)))
    if not tasks:
        raise CalibrationError("`tasks` names no task; give names such as arc_easy,piqa, or the preset 'paper'.")
    return tuple(tasks)


def evaluate_tasks(
    models: Sequence[str],
    tasks: Sequence[str],
    *,
    task_path: Path | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> TaskEvaluation:
    """Score each model on tasks of lm-evaluation-harness.

    Args:
        models: names of originals or of shiftadd checkpoints, see `open_any`.
        tasks: names of tasks, groups or tags that the harness knows, or that `task_path` defines.
        task_path: folder with the user's own task files (.yaml).
        fewshot: examples in the prompt, for tasks that do not fix their number; None: as each task specifies.
        limit: use only the first `limit` documents of each task; None: all.
        trust_remote_code: run model code that ships with a model.
        seed: seed for the choice of examples.

    Raises:
        ShiftaddError: the harness is not installed, a task is unknown, its data cannot be loaded, or there is a problem
            with a model; all but the last are raised before a model is loaded.
    """
    device = device or torch.device("cpu")
    opened = [open_any(spec, trust_remote_code=trust_remote_code) for spec in models]
    for model in opened:
        if model.reads_images:
            raise RecipeError(f"{model.spec} is a vision model and cannot run tasks; evaluate it on images instead.")
    with _quiet():
        manager, built = _build(tuple(tasks), task_path)
        results = []
        for model in opened:
            start = time.monotonic()
            loaded = model.load(dtype, device)
            scores = _run(loaded, built, manager, fewshot=fewshot, limit=limit, batch_size=batch_size, seed=seed)
            results.append(ModelTasks(loaded.info, scores, time.monotonic() - start))
    return TaskEvaluation(tuple(results), tuple(tasks), fewshot, limit, str(device), version("lm_eval"))


def check_harness() -> None:
    """Raise CalibrationError, with the fix, if lm-evaluation-harness is not installed."""
    try:
        version("lm_eval")
    except PackageNotFoundError:
        raise CalibrationError(
            "`tasks` needs lm-evaluation-harness; install it with: pip install 'shiftadd-cli[eval]'"
        ) from None


@cache
def harness_tasks(task_path: Path | None, own_only: bool = False) -> Any:
    """The harness's `TaskManager`, which reads ten thousand files of built-in tasks, in 5 seconds or more.

    own_only: only load the tasks in `task_path`, which is immediate.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if task_path is None else str(task_path), include_defaults=not own_only)


def _build(names: tuple[str, ...], task_path: Path | None) -> tuple[Any, list[Any]]:
    """The harness's manager and its task objects, with their data loaded."""
    check_harness()
    manager = harness_tasks(task_path, own_only=True) if task_path is not None else None
    # A group may have members among the harness's built-in tasks.
    if manager is None or not set(names) <= set(manager.all_tasks) - set(manager.all_groups):
        manager = harness_tasks(task_path)
    for name in names:
        if name not in manager.all_tasks:
            where = "" if task_path is None else f" and no task file in {task_path} defines it"
            raise CalibrationError(
                f"lm-evaluation-harness knows no task {name!r}{where}; `lm-eval ls tasks` lists those it has."
            )
    built: list[Any] = []
    for name in names:
        try:
            loaded = manager.load([name])
        # Loading a task's data can fail in the hub, the network, builder scripts or files, without a common base class.
        except Exception as failure:
            reason = first_line(failure)
            raise CalibrationError(
                f"The data of task {name} cannot be loaded ({reason}); check the network, or give `task_path` with a "
                "task on local files."
            ) from failure
        group = loaded["groups"].get(name)
        # A tag is only a list of tasks.
        built += [group] if group is not None else list(loaded["tasks"].values())
    return manager, built


def _run(
    loaded: Loaded,
    tasks: list[Any],
    manager: Any,
    *,
    fewshot: int | None,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> tuple[TaskScore, ...]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    rows = loaded.model.get_input_embeddings().weight.shape[0]

    class Checked(HFLM):
        """Refuses tokens outside the model's vocabulary, which would raise an IndexError in its embedding."""

        def tok_encode(self, *args: Any, **kwargs: Any) -> list[int]:
            ids: list[int] = super().tok_encode(*args, **kwargs)
            self._check(ids)
            return ids

        def tok_batch_encode(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            ids, mask = super().tok_batch_encode(*args, **kwargs)
            self._check(ids)
            return ids, mask

        def _check(self, ids: torch.Tensor | list[int]) -> None:
            check_tokens(torch.as_tensor(ids), loaded.tokenizer, rows, data="A task", model=loaded.info.spec)

    model = Checked(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        backend="causal",
        batch_size=batch_size,
        # The harness does not know every configuration key for this limit.
        max_length=position_limit(loaded.model.config),
    )
    results = simple_evaluate(
        model,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=fewshot,
        limit=limit,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert results is not None, "the only process is the one that gets the results"
    return tuple(_scores(results))


def _scores(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Every metric in the harness's results: `{task: {"metric,filter": value, "metric_stderr,filter": error}}`."""
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            yield TaskScore(
                task=task,
                metric=metric,
                filter=kind,
                value=float(value),
                error=float(error) if isinstance(error, (int, float)) else None,
                samples=int(_samples(results, task)),
                version=str(results["versions"].get(task, "")),
                higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
            )


def _samples(results: Mapping[str, Any], task: str) -> int:
    """Number of documents of a task, or of all tasks of a group."""
    counts = results["n-samples"]
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_samples(results, member) for member in results["group_subtasks"].get(task, ()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Only let errors of the harness through, which otherwise logs every step and seed."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
