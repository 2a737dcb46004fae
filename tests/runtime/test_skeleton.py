from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from artifacts import write_checkpoint
from tiny_models import FAMILIES, MIXTURES, tiny_model

from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.runtime.skeleton import artifact_skeleton


@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
def test_skeleton_is_the_dense_model_without_its_weights(tmp_path: Path, family: str) -> None:
    checkpoint = write_checkpoint(tiny_model(family), tmp_path / "out")
    skeleton = artifact_skeleton(checkpoint.folder)
    assert {name: tensor.shape for name, tensor in skeleton.state_dict().items()} == {
        name: tensor.shape for name, tensor in checkpoint.dense.state_dict().items()
    }
    assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in skeleton.parameters())
    tied = skeleton.get_input_embeddings().weight is skeleton.get_output_embeddings().weight
    assert tied == bool(checkpoint.dense.all_tied_weights_keys)


def test_configuration_of_an_unknown_model_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tiny_model("llama"), tmp_path / "out").folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))
    with pytest.raises(ArtifactError, match="cannot be read"):
        artifact_skeleton(folder)
