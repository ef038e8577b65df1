"""Starts a program by its path with little to use: `python -I start_confined.py PROGRAM ARGUMENT…`.

Standard library only. The limits hold for the program and whatever it starts.
"""

from __future__ import annotations

import resource
import runpy
import sys

FILE_BYTES = 256 << 20
"""Largest file that it may write: answers go through pipes, or are some megabytes."""
OPEN_FILES = 4096
"""Most files that it may have open at once; a model has one per shard."""


def lower(limit: int, most: int) -> None:
    """Set a limit of this process for good, unless it is lower already."""
    _, hard = resource.getrlimit(limit)
    value = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(limit, (value, value))


def main() -> None:
    """Set the limits, and be the program."""
    lower(resource.RLIMIT_CORE, 0)
    lower(resource.RLIMIT_FSIZE, FILE_BYTES)
    lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
