"""An image's bytes to a square of pixels, and how the pixels are stored."""
