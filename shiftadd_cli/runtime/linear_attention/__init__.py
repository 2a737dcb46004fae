"""Attention whose state does not grow: softmax over the nearest tokens, a linear state for all older ones."""
