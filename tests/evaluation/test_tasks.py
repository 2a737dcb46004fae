"""Tasks of lm-evaluation-harness on local files, compared with log-likelihoods from transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from shiftadd_cli.errors import CalibrationError
from shiftadd_cli.evaluation.tasks import PAPER_TASKS, evaluate_tasks, harness_tasks, task_names

QUESTIONS: list[dict[str, Any]] = [
    {"question": "The colour of the sky is", "choices": ["blue", "a number", "two"], "label": 0},
    {"question": "A statement ends with", "choices": ["the module", "a newline", "nothing at all"], "label": 1},
    {"question": "Names are bound by", "choices": ["rain", "assignment", "colour"], "label": 1},
    {"question": "Objects have", "choices": ["a type", "weather", "seas"], "label": 0},
    {"question": "The word is", "choices": ["x", "yes or no", "import"], "label": 2},
    {"question": "Numbers are", "choices": ["objects", "birds", "if and else"], "label": 2},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    (folder / "questions.yaml").write_text(
        f"""
task: shiftadd_questions
dataset_path: json
dataset_kwargs:
  data_files: {{test: {json.dumps(str(data))}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3.0}}
"""
    )
    return folder


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    prompt = tokenizer(question, return_tensors="pt").input_ids
    full = tokenizer(f"{question} {answer}", return_tensors="pt").input_ids
    chances = model(full).logits[0, :-1].double().log_softmax(-1)
    targets = full[0, 1:]
    return float(chances.gather(1, targets[:, None])[prompt.shape[1] - 1 :].sum())


def test_accuracy_counts_the_likeliest_answers(model: Path, tasks: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    right = []
    for question in QUESTIONS:
        scores = [log_likelihood(original, tokenizer, question["question"], choice) for choice in question["choices"]]
        right.append(scores.index(max(scores)) == question["label"])
    assert 0 < sum(right) < len(right), "some answers must be right and some wrong"

    result = evaluate_tasks([str(model), str(model)], ["shiftadd_questions"], task_path=tasks, fewshot=0)
    assert [measured.info.spec for measured in result.models] == [str(model)] * 2
    for measured in result.models:
        (score,) = measured.scores
        assert (score.task, score.metric, score.filter) == ("shiftadd_questions", "acc", "none")
        assert score.value == pytest.approx(sum(right) / len(right))
        assert score.error is not None
        assert score.error > 0
        assert (score.samples, score.higher_is_better) == (len(QUESTIONS), True)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["tasks"] == ["shiftadd_questions"]


def test_leading_tokens_come_once_at_the_start_of_a_text(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("llama", tmp_path / "begun", before=("<|user|>",))
    seen: list[torch.Tensor] = []
    forward = LlamaForCausalLM.forward

    def watch(self: LlamaForCausalLM, input_ids: torch.Tensor, **options: Any) -> Any:
        seen.extend(input_ids)
        return forward(self, input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watch)
    evaluate_tasks([str(model)], ["shiftadd_questions"], task_path=tasks, fewshot=0)
    user = tiny_tokenizer().convert_tokens_to_ids("<|user|>")
    # The harness first tries inputs that repeat a single token.
    questions = [ids.tolist() for ids in seen if len(set(ids.tolist())) > 1]
    assert questions
    assert all(ids[0] == user and ids.count(user) == 1 for ids in questions)


def test_a_token_beyond_the_embedding_is_refused_by_name(tasks: Path, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "beyond")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["colour"])
    tokenizer.save_pretrained(model)
    with pytest.raises(
        CalibrationError, match=r"A task has the token 'colour' \(id 320\), and the embedding of .*320 rows"
    ):
        evaluate_tasks([str(model)], ["shiftadd_questions"], task_path=tasks, fewshot=0)


def test_a_limit_takes_the_first_documents(model: Path, tasks: Path) -> None:
    result = evaluate_tasks([str(model)], ["shiftadd_questions"], task_path=tasks, limit=2)
    assert result.models[0].scores[0].samples == 2
    assert result.limit == 2


def test_unknown_tasks_are_refused_by_name(model: Path, tasks: Path) -> None:
    with pytest.raises(CalibrationError, match=r"knows no task 'no_such_task' and no task file in .* defines it"):
        evaluate_tasks([str(model)], ["no_such_task"], task_path=tasks)


def test_missing_data_is_reported_with_its_task(model: Path, tmp_path: Path) -> None:
    (tmp_path / "lost.yaml").write_text(
        f"task: shiftadd_lost\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/no.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: t\n"
    )
    with pytest.raises(CalibrationError, match="The data of task shiftadd_lost cannot be loaded"):
        evaluate_tasks([str(model)], ["shiftadd_lost"], task_path=tmp_path)


def test_presets_expand_to_their_tasks_without_repetition() -> None:
    assert task_names("piqa, paper ,mmlu") == ("piqa", *(task for task in PAPER_TASKS if task != "piqa"))
    with pytest.raises(CalibrationError, match="names no task"):
        task_names(" , ")


def test_the_harness_knows_every_task_of_the_paper() -> None:
    assert set(PAPER_TASKS) <= set(harness_tasks(None).all_tasks)
