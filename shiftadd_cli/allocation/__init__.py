"""Bits for every layer: how much they matter to each, the best choice under a budget, and the file it is kept in."""
