"""Running a model block by block, so that only one block is in memory: its calls, hidden states, and caches."""
