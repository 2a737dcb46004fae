"""What `benchmark_allocation.py` is made of, beside the modules of `quality`."""
