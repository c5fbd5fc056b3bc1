"""Phantoms: procedural breast tissue, from a seed and an index alone, that synthetic backgrounds begin with."""
