"""The networks of all components."""
