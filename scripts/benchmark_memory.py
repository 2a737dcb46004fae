"""Peak resident memory of `shiftadd quantize` against the size of the model.

Generates Llama models with random weights that differ only in the number of blocks, quantizes each in a process of its
own, and prints the peak that the operating system reports next to the planned peak. Memory must not grow with the
number of blocks: the weights of a block are read, quantized, written and dropped.

    python scripts/benchmark_memory.py --blocks 4 --blocks 8 --blocks 16 --width 1024 --max-memory 2GB
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from subprocess import run

import click
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from shiftadd_cli.cli.summary import table
from shiftadd_cli.sizes import size

VOCABULARY = 4096


def write_model(folder: Path, blocks: int, width: int) -> int:
    """Write a random Llama of `blocks` blocks shard by shard, which needs little memory, and return its bytes."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=width * 11 // 4 // 64 * 64,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name, _ in skeleton.named_parameters():
        block = name.split(".")[2] if name.startswith("model.layers.") else "outside"
        shards.setdefault(f"model-{block}.safetensors", []).append(name)
    total = 0
    for file, names in shards.items():
        tensors = {}
        for name in names:
            shape = skeleton.get_parameter(name).shape
            norm = len(shape) == 1
            tensors[name] = (
                torch.ones(shape) if norm else torch.randn(shape, generator=generator) / width**0.5
            ).bfloat16()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tokenizer(folder)
    return total


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer; the content of the text does not matter here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@click.command()
@click.option("--blocks", multiple=True, type=int, default=(4, 8, 16), show_default=True)
@click.option("--width", default=1024, show_default=True, help="Hidden size; a multiple of 64.")
@click.option("--recipe", "recipes", multiple=True, default=("fast", "equal-bits"), show_default=True)
@click.option("--samples", default=32, show_default=True)
@click.option("--seq-len", default=256, show_default=True)
@click.option("--max-memory", metavar="SIZE", help="For all runs, as for `shiftadd quantize`.")
@click.option("--keep", type=click.Path(path_type=Path), help="Write the models here and keep them.")
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON.")
def main(
    blocks: tuple[int, ...],
    width: int,
    recipes: tuple[str, ...],
    samples: int,
    seq_len: int,
    max_memory: str | None,
    keep: Path | None,
    as_json: bool,
) -> None:
    """Measure peak memory for models of several depths."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for count in blocks:
            model = folder / f"llama-{count}x{width}"
            written = write_model(model, count, width)
            for recipe in recipes:
                out = folder / f"{model.name}-{recipe}"
                command = [sys.executable, "-m", "shiftadd_cli", "quantize", str(model), "-o", str(out)]
                command += ["--recipe", recipe, "--samples", str(samples), "--seq-len", str(seq_len)]
                command += ["--max-memory", max_memory] if max_memory else []
                run(command, check=True, stdout=sys.stderr)
                report = json.loads((out / "report.json").read_text())
                hidden = samples * seq_len * width * 2 if report["calibration"] else 0
                machine = report["machine"]
                rows.append(
                    {
                        "recipe": recipe,
                        "blocks": count,
                        "model_bytes": written,
                        "hidden_states_bytes": hidden,
                        "peak_bytes": machine["peak_memory_bytes"],
                        "planned_bytes": machine["expected_memory_bytes"],
                        "seconds": report["seconds"]["total"],
                    }
                )
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    header = ("recipe", "blocks", "model", "states on disk", "peak memory", "planned", "seconds")
    cells = [
        (
            row["recipe"],
            str(row["blocks"]),
            size(row["model_bytes"]),
            size(row["hidden_states_bytes"]),
            size(row["peak_bytes"]),
            size(row["planned_bytes"]),
            f"{row['seconds']:.0f}",
        )
        for row in sorted(rows, key=lambda row: recipes.index(row["recipe"]))
    ]
    click.echo(table(header, cells))


if __name__ == "__main__":
    main()
