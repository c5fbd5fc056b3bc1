"""Phantoms: procedural breast tissue, from random numbers alone, that synthetic backgrounds begin with."""
