"""SAEs: which file formats there are, and cutting one down to a few features."""
