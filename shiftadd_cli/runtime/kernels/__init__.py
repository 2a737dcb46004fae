"""Kernels that multiply by compressed weights without making dense ones of them."""
