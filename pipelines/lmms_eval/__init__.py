"""lmms-eval's tasks, in an environment of its own."""
