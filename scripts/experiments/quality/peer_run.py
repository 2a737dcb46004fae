"""Runs one peer on one model in a separate process: writes the model with the peer's decoded weights, and peer.json.

python -m experiments.quality.peer_run hqq MODEL OUT RECIPE.yaml
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from experiments.quality.peers import PEERS, PeerJob
from shiftadd_cli.errors import RecipeError, ShiftaddError
from shiftadd_cli.pipeline.calibration import draw_calibration
from shiftadd_cli.pipeline.memory import resident_bytes
from shiftadd_cli.pipeline.plan import make_plan
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import find_structure, open_source

REPORT_FILE = "peer.json"


def run_peer(name: str, spec: str, out: Path, recipe: Recipe) -> None:
    """Quantize the same linears as our own recipes, on the same calibration windows, and write the decoded weights."""
    start = time.monotonic()
    peer, source = PEERS[name], open_source(spec)
    if not isinstance(recipe.group_size, int):
        raise RecipeError(f"The peer {name!r} needs a number as group_size, not {recipe.group_size!r}.")
    if recipe.bits is None:
        raise RecipeError(f"The peer {name!r} needs one number of bits for all layers.")
    linears = find_structure(source.skeleton()).linears
    tokenizer = source.load_tokenizer()
    calibration = draw_calibration(make_plan(source, recipe)) if peer.calibrated else None
    windows = None if calibration is None else calibration.samples
    model = source.load_model()
    parameters, item = sum(tensor.numel() for tensor in model.parameters()), source.dtype.itemsize
    names = [linear.name for linear in linears]
    job = PeerJob(model, tokenizer, names, windows, recipe.bits, recipe.group_size, recipe.batch_size, recipe.seed)
    stored = peer.adapter().compress(job)
    weights = sum(linear.out_features * linear.in_features for linear in linears)
    # A hidden name until it is complete: a killed run must not pass for a finished one.
    scratch = out.with_name(f".{out.name}")
    model.save_pretrained(scratch)
    source.save_companions(scratch)
    report = {
        "stored_bits": stored / weights,
        "file_bits": (stored + 8 * item * (parameters - weights)) / parameters,
        "seconds": time.monotonic() - start,
        "peak_memory_bytes": resident_bytes(),
        "calibration": None if calibration is None else calibration.name,
    }
    (scratch / REPORT_FILE).write_text(json.dumps(report))
    scratch.rename(out)


def main() -> None:
    name, spec, out, recipe = sys.argv[1:]
    try:
        run_peer(name, spec, Path(out), Recipe.load(recipe))
    except ShiftaddError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
