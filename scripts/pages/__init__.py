"""What `generate_docs.py` is made of: the parts of pages that come from the code and from measured rows."""
