"""Tuning what was quantized against the output of a whole block, by gradient."""
