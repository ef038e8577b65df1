"""`python -m bakeout`."""

from bakeout.cli import main

main()
