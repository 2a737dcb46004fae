"""Several processes, on one machine or more, that work on one model together."""
