"""`python -m bakeout`."""

import sys
from pathlib import Path

# Python puts the current folder first, which may be a stranger's: nothing is imported from there.
if sys.path and Path(sys.path[0]).resolve() == Path.cwd() != Path(__file__).resolve().parents[1]:
    del sys.path[0]

from bakeout.cli import main

main()
