"""Ways of asking for what was to be forgotten."""
