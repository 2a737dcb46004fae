"""A compressed checkpoint in formats that others read, decoded tensor by tensor."""
