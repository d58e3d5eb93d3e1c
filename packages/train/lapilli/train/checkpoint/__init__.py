"""Checkpoints: layout, saving and loading, starting from another run, upload."""
