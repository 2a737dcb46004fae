"""What `benchmark_quality.py` is made of."""
