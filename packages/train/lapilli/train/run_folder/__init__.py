"""The files of a run's folder: their names, readers and writers."""
