"""Where a dataset's shards go: a local folder or a URL."""
