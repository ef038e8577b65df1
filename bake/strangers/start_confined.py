"""Starts a program by its path with little to use: `python -I start_confined.py PROGRAM ARGUMENT…`.

Standard library only. The limits hold for the program and whatever it starts: small files, no core
dumps, and where Linux has Landlock no writing outside the folder it is started in, and no TCP.
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import struct
import sys

FILE_BYTES = 256 << 20
"""Largest file that it may write: answers go through pipes, or are some megabytes."""
OPEN_FILES = 4096
"""Most files that it may have open at once; a model has one per shard."""
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""System calls of Landlock, by Linux's documentation (userspace-api/landlock)."""
_NO_NEW_PRIVILEGES = 38
"""Of prctl; Landlock asks for it."""
_WRITES = sum(1 << bit for bit in (1, *range(4, 13)))
"""To write, remove and make files, folders, links, pipes and sockets."""
_REFER, _TRUNCATE, _TCP = 1 << 13, 1 << 14, 3


def lower(limit: int, most: int) -> None:
    """Set a limit of this process for good, unless it is lower already."""
    _, hard = resource.getrlimit(limit)
    value = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(limit, (value, value))


def landlock_version() -> int:
    """Which of Landlock's rules the system knows; 0 where it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, _call(_CREATE_RULESET, None, 0, 1))


def write_only_below(*folders: str) -> None:
    """Forbid this process to write elsewhere, and TCP, as far as the system can."""
    version = landlock_version()
    if not version:
        return
    writes = _WRITES | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    handled = struct.pack("QQ", writes, _TCP) if version >= 4 else struct.pack("Q", writes)
    rules = _call(_CREATE_RULESET, handled, len(handled), 0)
    if rules < 0:
        return
    for folder in folders:
        place = os.open(folder, os.O_PATH)
        _call(_ADD_RULE, rules, 1, struct.pack("=Qi", writes, place), 0)
        os.close(place)
    ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call(_RESTRICT_SELF, rules, 0)
    os.close(rules)


def _call(number: int, *arguments: int | bytes | None) -> int:
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return int(ctypes.CDLL(None).syscall(ctypes.c_long(number), *given))


def main() -> None:
    """Set the limits, and be the program."""
    lower(resource.RLIMIT_CORE, 0)
    lower(resource.RLIMIT_FSIZE, FILE_BYTES)
    lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    write_only_below(".", "/dev")
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
