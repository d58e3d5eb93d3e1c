"""The chat page's server: requests, bounds and the model's worker."""
