"""The figures of a step, and where they are logged."""
