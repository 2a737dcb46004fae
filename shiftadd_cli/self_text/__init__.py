"""A calibration text that the model writes itself, so that it is about what the model knows and needs no download."""
