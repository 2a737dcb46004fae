"""The modules of `benchmark_allocation.py`, in addition to those of `quality`."""
