"""Opens a model in place: headers first, tensors on demand, structure found without model names."""

from shiftadd_cli.source.model import Source
from shiftadd_cli.source.open import open_source
from shiftadd_cli.source.structure import LinearSpec, Structure, find_structure

__all__ = ["LinearSpec", "Source", "Structure", "find_structure", "open_source"]
