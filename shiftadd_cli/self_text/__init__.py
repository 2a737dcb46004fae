"""A calibration text that the model writes itself: it matches the model's knowledge and needs no download."""
