"""Kernels that multiply by a compressed matrix without writing the dense one, by the kind of processor they are for."""
