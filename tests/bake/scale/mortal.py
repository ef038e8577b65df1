"""Workers that die or do not start. A worker imports this alone, and nothing that takes seconds."""

from __future__ import annotations

import os

from bake.scale.crew import about_here


class Mortal:
    """A worker that some items kill."""

    def about(self) -> dict[str, str]:
        return about_here()

    def halved(self, n: int) -> int:
        if n == 7:
            os._exit(1)
        return n // 2


class Broken:
    """A worker that cannot be made."""

    def __init__(self) -> None:
        raise OSError("no such library")

    def about(self) -> dict[str, str]:
        raise AssertionError
