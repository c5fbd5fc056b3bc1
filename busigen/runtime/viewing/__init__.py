"""A page to look at a dataset: served on this machine alone, or written as one file."""
