"""Trellis-coded planes."""
