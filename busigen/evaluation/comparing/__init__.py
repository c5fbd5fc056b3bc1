"""Intervals, floors and tests between two sets of images that come in groups."""
