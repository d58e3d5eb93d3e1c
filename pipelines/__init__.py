"""One verb a file, run as `python -m pipelines.VERB`."""
