"""The modules of `check_architectures.py`."""
