"""Passes on the graph of one cell: what makes it cheaper, and what makes it many cells at once."""
