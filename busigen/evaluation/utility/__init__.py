"""Section: utility."""
