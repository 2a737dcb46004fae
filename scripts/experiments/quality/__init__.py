"""The modules of `benchmark_quality.py`."""
