"""Tuning a whole compressed model towards the predictions of the original."""
