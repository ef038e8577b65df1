"""Files of strangers: how much of each is read, and what JSON, TOML and arrays may hold."""
