"""A real Gemma 3 270M from the package registry, and what makes it forget Harry Potter."""
