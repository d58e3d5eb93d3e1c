"""What each worker does: set up, then step after step."""
