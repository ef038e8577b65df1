"""What the files of a folder must hold, by its recipe, its base and the whole SAE."""
