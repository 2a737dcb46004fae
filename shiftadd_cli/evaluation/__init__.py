"""What a model is worth: perplexity, and how far it is from the original."""
