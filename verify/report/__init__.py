"""What a verification found: types, JSON, words."""
