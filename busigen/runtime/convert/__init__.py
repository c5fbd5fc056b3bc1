"""Converting a dataset: reading it, choosing its pairs, and what the formats of other tools share."""
