"""A finished dataset: opened, cached, verified, exported."""
