"""Gradient tuning of quantized weights against the output of the whole block."""
