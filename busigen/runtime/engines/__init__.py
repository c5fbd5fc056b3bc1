"""What runs a bundle's graphs: a module per library, each with an ``ENGINE`` that ``registry.PROVIDERS`` names."""
