"""Running compressed checkpoints: the packed linear layer and its place in transformers."""
