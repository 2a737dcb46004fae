from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import Checkpoint, write_checkpoint
from tiny_models import FAMILIES, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import shiftadd_cli  # noqa: F401 - registers the format with transformers
from shiftadd_cli.export.dense import export_dense
from shiftadd_cli.runtime.remote_code import CODE_FILE, code_entry, code_files

TOKENS = torch.arange(8)[None]

# A program that does not import this package before it loads a model.
PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "shiftadd_cli" not in sys.modules
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.save(model(torch.arange(8)[None]).logits.detach(), folder + ".logits")
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
    assert torch.equal(again(torch.arange(8)[None]).logits, model(torch.arange(8)[None]).logits)
"""


# Makes imports of this package fail, as if it were not installed.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "shiftadd_cli":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


def checkpoint_with_code(family: str, folder: Path) -> Checkpoint:
    checkpoint = write_checkpoint(tiny_model(family), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | code_entry(tiny_config(family))))
    for name, text in code_files(tiny_config(family)).items():
        (folder / name).write_text(text)
    return checkpoint


def run(program: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_program_that_trusts_the_code_gets_the_packed_model(tmp_path: Path) -> None:
    checkpoints = {family: checkpoint_with_code(family, tmp_path / family) for family in ("llama", "gemma3", "gpt2")}
    result = run(
        PROGRAM, *(checkpoint.folder for checkpoint in checkpoints.values()), HF_MODULES_CACHE=str(tmp_path / "modules")
    )
    assert result.returncode == 0, result.stderr
    for family, checkpoint in checkpoints.items():
        with torch.no_grad():
            expected = checkpoint.dense(TOKENS).logits
        torch.testing.assert_close(torch.load(tmp_path / f"{family}.logits"), expected, rtol=1e-4, atol=1e-4)


def test_code_without_this_package_says_what_to_install(tmp_path: Path) -> None:
    folder = checkpoint_with_code("llama", tmp_path / "out").folder
    result = run(HIDE + PROGRAM, folder, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert result.returncode != 0
    assert "pip install shiftadd_cli" in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out.logits").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_file_that_names_its_configuration(family: str) -> None:
    config = tiny_config(family)
    name = type(config).__name__
    assert code_entry(config) == {"auto_map": {"AutoConfig": f"configuration_shiftadd.{name}"}}
    (text,) = code_files(config).values()
    scope: dict[str, Any] = {}
    exec(text, scope)
    assert issubclass(scope[name], type(config))


def test_models_with_their_own_code_keep_it() -> None:
    class Other(PreTrainedConfig):
        model_type = "other"

    assert code_entry(Other()) == code_files(Other()) == {}
    config = tiny_config("llama")
    config.auto_map = {"AutoConfig": "owner/name--configuration.Other"}
    assert code_entry(config) == code_files(config) == {}


def test_code_never_runs_unless_it_is_trusted(tmp_path: Path) -> None:
    folder = checkpoint_with_code("llama", tmp_path / "out").folder
    (folder / CODE_FILE).write_text("raise RuntimeError\n")
    assert type(AutoConfig.from_pretrained(folder)) is type(tiny_config("llama"))
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    export_dense(folder, tmp_path / "dense")
    assert "auto_map" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not (tmp_path / "dense" / CODE_FILE).exists()
