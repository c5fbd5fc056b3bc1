"""Labelled folders as one listing: a layout a file, and which mask belongs to which image."""
