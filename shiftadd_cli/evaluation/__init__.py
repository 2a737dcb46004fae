"""Quality of a model: perplexity, accuracy, and distance from the original."""
