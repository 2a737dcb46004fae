"""The modules of `generate_docs.py`: the parts of pages that come from the code and from measured rows."""
