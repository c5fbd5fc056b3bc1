"""The dataset's format: samples, shards, records, cards; reading what may come from anywhere."""
