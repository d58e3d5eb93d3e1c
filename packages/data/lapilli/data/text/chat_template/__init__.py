"""A tokenizer's own chat template: read, run within bounds, its turns located."""
