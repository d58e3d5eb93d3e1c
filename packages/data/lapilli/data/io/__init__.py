"""Files, addresses and locks: reading and writing on a disk or in an object store."""
