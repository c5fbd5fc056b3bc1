"""Runtime: bundle reader, backends, noise, the three-stage sampler, shards, resume, verify. Imports no torch."""
