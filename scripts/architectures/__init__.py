"""What `check_architectures.py` is made of."""
