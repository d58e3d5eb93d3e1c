"""Starting a run: preflight, memory estimate, workers, replay."""
