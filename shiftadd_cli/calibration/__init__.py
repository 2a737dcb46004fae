"""Texts for calibration and measurement, cut into windows of tokens."""
