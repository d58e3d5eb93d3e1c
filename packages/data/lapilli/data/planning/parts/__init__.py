"""Records as Arrow parts: scanned by tasks over byte ranges, held in columns and on disk."""
