"""Section: ultrasound physics, and the measurements of every image that fidelity and privacy use as well."""
