"""`bakeout show`: what a folder says it is."""

from __future__ import annotations

from bakeout.terminal import show_folder
from bakeout.verbs.arguments import FolderPath


def show(folder: FolderPath) -> None:
    """What was baked: layers, features, method, provenance, exactness."""
    show_folder(folder)
