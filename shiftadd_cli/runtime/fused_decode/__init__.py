"""Decoder blocks that decode tokens in one native call, in place of transformers' own forward."""
