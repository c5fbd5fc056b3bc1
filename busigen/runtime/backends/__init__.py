"""What runs a bundle's graphs: providers, the bundle's reader, engines."""
