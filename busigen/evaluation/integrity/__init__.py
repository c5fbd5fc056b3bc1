"""Section: integrity and masks."""
