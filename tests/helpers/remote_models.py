"""A model with its own Python code, which leaves a marker file in the current folder when it is executed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import VOCAB_SIZE, tiny_tokenizer

MARK = "EXECUTED"

_CONFIGURATION = f"""
import pathlib

pathlib.Path("{MARK}").touch()

from transformers import PretrainedConfig


class MyConfig(PretrainedConfig):
    model_type = "mine-alone"

    def __init__(self, vocab_size={VOCAB_SIZE}, width=32, **other):
        self.vocab_size, self.width = vocab_size, width
        super().__init__(**other)
"""
_MODEL = """
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_mine import MyConfig


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, hidden_states):
        return hidden_states + self.down(self.up(self.norm(hidden_states)).relu())


class MyModel(PreTrainedModel):
    config_class = MyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList([Layer(config.width) for _ in range(2)])
        self.lm_head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **_):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.lm_head(hidden))
"""


def save_remote_model(folder: Path) -> Path:
    """Write the model with its code and the tiny tokenizer to `folder`; the code is not executed."""
    folder.mkdir(parents=True)
    (folder / "configuration_mine.py").write_text(_CONFIGURATION)
    (folder / "modeling_mine.py").write_text(_MODEL)
    config = {
        "model_type": "mine-alone",
        "architectures": ["MyModel"],
        "dtype": "float32",
        "auto_map": {"AutoConfig": "configuration_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (VOCAB_SIZE, 32), "lm_head.weight": (VOCAB_SIZE, 32), "lm_head.bias": (VOCAB_SIZE,)}
    for layer in ("layers.0", "layers.1"):
        shapes |= {f"{layer}.norm.weight": (32,), f"{layer}.up.weight": (48, 32), f"{layer}.up.bias": (48,)}
        shapes |= {f"{layer}.down.weight": (32, 48), f"{layer}.down.bias": (32,)}
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    return folder
