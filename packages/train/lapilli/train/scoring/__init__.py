"""Scores of an answers file by name, and the forms that benchmarks' servers take."""
