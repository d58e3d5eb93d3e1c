"""Samples to batches: the order of an epoch and collation."""
