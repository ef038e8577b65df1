"""Pages."""

from typing import Any


def sweep_page(found: dict[str, Any]) -> str:
    """The page."""
    return ""
