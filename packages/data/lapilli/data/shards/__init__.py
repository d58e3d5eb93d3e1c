"""The files of a dataset: schemas, writing and reading, the manifest."""
