"""Tuning a compressed model as a whole towards what the original predicts."""
