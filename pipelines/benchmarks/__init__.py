"""Measurements, one topic a file: `python -m pipelines.benchmarks TOPIC`."""
