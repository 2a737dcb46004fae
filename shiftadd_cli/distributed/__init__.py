"""Several processes, on one or more machines, that work on one model together."""
