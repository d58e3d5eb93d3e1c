"""Published results, and the steps that lead to them."""
