"""What each component learns, and from what."""
