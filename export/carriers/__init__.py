"""The ways in which a folder can carry the clamp."""
