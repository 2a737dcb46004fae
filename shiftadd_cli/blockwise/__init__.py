"""Running a model with only one block in memory at a time: block calls, hidden states, and caches."""
