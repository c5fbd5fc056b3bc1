"""Files that appear whole, locks on folders, and places at URLs."""
