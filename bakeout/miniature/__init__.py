"""The shipped miniature: a small Gemma 2, its SAE, corpora, questions and recipe."""
