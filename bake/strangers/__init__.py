"""Folders of strangers: what would run code in them, and processes that are kept from the rest."""
