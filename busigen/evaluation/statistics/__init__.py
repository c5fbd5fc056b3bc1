"""Statistics of grouped images: intervals, floors, two-sample tests."""
