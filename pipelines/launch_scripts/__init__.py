"""Launch scripts of other trainers: their flags, and ours for them."""
