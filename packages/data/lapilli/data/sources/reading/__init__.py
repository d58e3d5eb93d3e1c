"""Annotation files as records of bytes: streaming JSON, Parquet rows, tar members."""
