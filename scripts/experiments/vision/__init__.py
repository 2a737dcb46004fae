"""What `scripts/benchmark_vision.py` is made of."""
