"""Bit allocation: the sensitivity of every layer, the best choice of bits within a budget, and the plan file."""
