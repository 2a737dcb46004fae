"""Runs methods and measures their results: quality of texts, bit mixes, vision. Rows are in `measured/`."""
