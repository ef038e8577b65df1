"""What a folder's files can be run in."""
