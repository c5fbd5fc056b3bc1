"""A run of `generate`: options, partition, workers, signals, events."""
