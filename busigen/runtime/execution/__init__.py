"""A run of `generate`: options, shards, workers, signals, events."""
