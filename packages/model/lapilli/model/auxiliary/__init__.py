"""Task tokens behind images, and losses of hidden states against teachers' features."""
