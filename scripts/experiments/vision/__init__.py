"""The modules of `benchmark_vision.py`."""
