"""Section: privacy."""
