"""The clamp as two stock decoder layers."""
