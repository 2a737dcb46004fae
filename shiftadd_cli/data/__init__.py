"""Calibration and test data: texts cut into windows of tokens, conversations, images, and mixtures of them."""
