"""After the run: verify, repair, explain, merge."""
