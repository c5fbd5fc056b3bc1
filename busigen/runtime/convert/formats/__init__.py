"""The formats of other tools, a module each; `registry.FORMATS` lists them."""
