"""Time and memory of a build's plan by its records."""
