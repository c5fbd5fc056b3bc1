"""Writes the frozen files anew."""

from tests.golden import main

main()
