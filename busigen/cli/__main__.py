"""``python -m busigen.cli``."""

from busigen.cli import main

main()
