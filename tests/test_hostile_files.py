"""Loaders load a damaged file or refuse it with a message: no crash, no hang, no giant allocation.

SHIFTADD_FUZZ is the number of mutations tried per file. For a longer run than the suite's:

    SHIFTADD_FUZZ=20000 make check TESTS=tests/test_hostile_files.py
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from artifacts import COMMON, write_checkpoint
from bit_plans import plan_for
from formats import recipe_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny, tiny_model

from shiftadd_cli.allocation.plan_file import load_plan
from shiftadd_cli.artifact.contents import Contents
from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.verify import verify
from shiftadd_cli.artifact.workspace import Workspace
from shiftadd_cli.artifact.writer import ArtifactWriter
from shiftadd_cli.blockwise.stored_states import StoredStates
from shiftadd_cli.errors import ShiftaddError
from shiftadd_cli.pipeline.account import PhaseClock
from shiftadd_cli.pipeline.history import History, RunInputs
from shiftadd_cli.pipeline.memory import resident_bytes
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.report.schema import DistillationReport
from shiftadd_cli.source.safetensors_folder import SafetensorsFolder, read_index

# No loader of a small file may take more memory than this.
ROOM = 300_000_000
BLOCKS = ("model.layers.0", "model.layers.1")

FUZZ = settings(
    max_examples=int(os.environ.get("SHIFTADD_FUZZ", "50")),
    deadline=timedelta(seconds=20),
    derandomize="SHIFTADD_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)

VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(0, 1, -1, 9, 2**31, 2**63, 10**30, 10**4000, 0.5, -1e308, float("nan"), float("inf")),
        *(None, True, "", "all", "1/0", "1/99999999999", "1/2", "../../etc/passwd", "/dev/zero", "\0", "x" * 10_000),
        *([], {}, [[]], [1, 2], ["a"], {"shape": [2**40, 2**40]}, {"shape": [0, 0]}),
    ]
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module", autouse=True)
def little_memory() -> Iterator[None]:
    before = resident_bytes()
    yield
    assert resident_bytes() - before < ROOM


def read_artifact(folder: Path) -> None:
    artifact = Artifact.open(folder)
    json.dumps(Contents.of(artifact).to_dict())
    verify(artifact)


def artifact_of_one_file(folder: Path) -> Path:
    common = COMMON.__class__(**{**vars(COMMON), "outlier_columns": 0.05, "rotation": "hadamard"})
    return write_checkpoint(tiny_model("llama"), folder, common=common, shard_bytes=10**9, tables=True).folder


def artifact_of_shards(folder: Path) -> Path:
    return write_checkpoint(tiny_model("llama"), folder).folder


def unfinished_run(folder: Path) -> Path:
    """The folder of a run with a finished block and a plan of bits."""
    model = save_tiny("llama", folder / "model")
    with Workspace(folder / "out") as workspace, ArtifactWriter(folder / "out", workspace=workspace) as writer:
        history = History(workspace, BLOCKS)
        recipe = recipe_of(samples=3)
        inputs = RunInputs(
            recipe=recipe.model_dump(mode="json"),
            source="0",
            tokens="1",
            bit_plan=None,
            computed="torch.float32",
            versions={"a": "1"},
            code="2",
        )
        history.begin(inputs)
        history.keep_bits(plan_for(model, recipe_of(group_size=16)), PhaseClock())
        writer.plan({"a": ((3,), torch.float32)})
        writer.add("a", torch.ones(3))
        states = StoredStates(workspace.states, 3, 2)
        for batch in torch.ones(3, 4, 5).split(2):
            states.append(batch)
        weights = {"model.layers.0.q": torch.ones(3, 4)}
        history.keep_start(writer, {"quantized": states}, [], weights, PhaseClock())
        for index, batch in enumerate(torch.zeros(3, 4, 5).split(2)):
            states.replace(index, batch)
        states.turn()
        history.keep_block(BLOCKS[0], [], [], writer, {"quantized": states}, PhaseClock())
    return folder


def distilled_run(folder: Path) -> Path:
    """The folder of a run that only has to write its distilled tensors."""
    unfinished_run(folder)
    with Workspace(folder / "out") as workspace:
        report = DistillationReport(divergence_before=0.2, divergence_after=0.1, kept=True)
        History(workspace, BLOCKS).keep_distilled(report, {"a": torch.zeros(3)}, PhaseClock())
    return folder


def read_run(folder: Path) -> None:
    with Workspace(folder / "out") as workspace:
        history = History(workspace, BLOCKS)
        if history.inputs is not None:
            history.begin(history.inputs)
        assert history.bit_plan is None or history.bit_plan.bits
        history.states(3, 2)
        history.token_weights()
        history.distilled_tensors()
        with ArtifactWriter(folder / "out", workspace=workspace) as writer:
            writer.plan({"a": ((3,), torch.float32)}, history.written)


def bit_plan(folder: Path) -> Path:
    model = save_tiny("llama", folder / "model")
    (folder / "plan.json").write_text(plan_for(model, recipe_of(group_size=16)).to_json())
    return folder


def recipe_file(folder: Path) -> Path:
    folder.mkdir()
    fields = Recipe.load("equal-bits").model_dump(mode="json", exclude={"avg_bits", "bit_plan"})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return folder


# Name → (function that writes good files, file to mutate, function that loads them).
CASES: dict[str, tuple[Callable[[Path], Path], str, Callable[[Path], object]]] = {
    "artifact config": (artifact_of_one_file, "config.json", read_artifact),
    "artifact report": (artifact_of_one_file, "report.json", read_artifact),
    "artifact tensors": (artifact_of_one_file, "model.safetensors", read_artifact),
    "artifact index": (artifact_of_shards, "model.safetensors.index.json", read_artifact),
    "source index": (
        lambda folder: save_tiny("llama", folder, sharded=True),
        "model.safetensors.index.json",
        lambda folder: (read_index(folder / "model.safetensors.index.json"), SafetensorsFolder(folder)),
    ),
    "source tensors": (lambda folder: save_tiny("llama", folder), "model.safetensors", SafetensorsFolder),
    "bit plan": (bit_plan, "plan.json", lambda folder: load_plan(folder / "plan.json")),
    "recipe": (recipe_file, "recipe.yaml", lambda folder: Recipe.load(str(folder / "recipe.yaml"))),
    **{
        f"unfinished run, {name}": (unfinished_run, f".out.partial/{name}", read_run)
        for name in (
            *("journal/run.json", "journal/bits.json", "journal/start.json", "journal/block-00000.json"),
            *("states/quantized-00001.safetensors", "states/token_weights.safetensors", "artifact/model.safetensors"),
        )
    },
    **{
        f"distilled run, {name}": (distilled_run, f".out.partial/{name}", read_run)
        for name in ("journal/distilled.json", "states/distilled.safetensors")
    },
}


def load(case: str, folder: Path) -> None:
    """Load the files, or check that the refusal is one sentence."""
    message = "."
    try:
        CASES[case][2](folder)
    except ShiftaddError as refusal:
        message = str(refusal)
    assert message.endswith(".")
    assert len(message) < 20_000


@pytest.mark.parametrize("case", CASES)
def test_good_files_load(root: Path, case: str) -> None:
    make, _, read = CASES[case]
    read(make(root / f"good {case.replace('/', ' ')}"))


@pytest.mark.parametrize("case", CASES)
def test_changed_bytes_load_or_are_refused(root: Path, case: str) -> None:
    folder = CASES[case][0](root / f"bytes {case.replace('/', ' ')}")
    path = folder / CASES[case][1]
    good = path.read_bytes()
    position = st.integers(0, min(len(good), 20_000))

    @FUZZ
    @given(start=position, length=st.integers(0, 40), new=st.binary(max_size=12), cut=st.none() | position)
    def mutate(start: int, length: int, new: bytes, cut: int | None) -> None:
        path.write_bytes((good[:start] + new + good[start + length :])[:cut])
        load(case, folder)
        restore(case, root, folder)

    mutate()


def restore(case: str, root: Path, folder: Path) -> None:
    """Start another run if the loader cleared this one away, as it does without a journal."""
    if case.startswith("unfinished") and not (folder / CASES[case][1]).exists():
        shutil.rmtree(folder)
        CASES[case][0](folder)


@pytest.mark.parametrize("case", [case for case, (_, file, _) in CASES.items() if not file.endswith(".safetensors")])
def test_changed_values_load_or_are_refused(root: Path, case: str) -> None:
    folder = CASES[case][0](root / f"values {case.replace('/', ' ')}")
    path = folder / CASES[case][1]
    good = yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())

    @FUZZ
    @given(data=st.data())
    def mutate(data: st.DataObject) -> None:
        changed = copy.deepcopy(good)
        for _ in range(data.draw(st.integers(1, 3))):
            changed = with_another_value(changed, data)
        if path.parent.name == "journal" and isinstance(changed, dict):
            changed = signed(changed)
        path.write_text(json.dumps(changed))
        load(case, folder)
        restore(case, root, folder)

    mutate()


def with_another_value(value: Any, data: st.DataObject) -> Any:
    """Replace or remove a random value, at any depth."""
    if not isinstance(value, (dict, list)) or not value:
        return copy.deepcopy(data.draw(VALUES))
    key = data.draw(st.sampled_from(list(value) if isinstance(value, dict) else list(range(len(value)))))
    action = data.draw(st.sampled_from(["inside", "inside", "replace", "remove"]))
    if action == "inside":
        value[key] = with_another_value(value[key], data)
    elif action == "replace":
        value[key] = copy.deepcopy(data.draw(VALUES))
    else:
        del value[key]
    return value


def signed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a matching checksum, so that its reader looks inside."""
    from shiftadd_cli.storage.record_file import _sum

    inner = record.get("record")
    return record | {"sha256": _sum(inner)} if isinstance(inner, dict) else record


@pytest.mark.parametrize("case", [case for case, (_, file, _) in CASES.items() if not file.endswith(".safetensors")])
def test_deep_nesting_is_refused(root: Path, case: str) -> None:
    folder = CASES[case][0](root / f"deep {case.replace('/', ' ')}")
    (folder / CASES[case][1]).write_text("[" * 200_000)
    with pytest.raises(ShiftaddError):
        CASES[case][2](folder)
