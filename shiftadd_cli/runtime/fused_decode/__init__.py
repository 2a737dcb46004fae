"""Decoder blocks of a new token in one native call, in place of transformers' own forward."""
