"""Decoder blocks that decode a token in one native call, in place of transformers' own forward."""
