"""A training step: measured, counted, and inside a whole run."""
