"""Section: fidelity."""
