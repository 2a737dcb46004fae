"""Exports of a compressed checkpoint to formats of other programs, decoded tensor by tensor."""
