"""busigen from Python: the commands as functions, and the pairs that they make or read."""
