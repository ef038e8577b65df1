"""The card (`README.md`) that goes with a folder."""

from model_cards.render import render_card

__all__ = ["render_card"]
