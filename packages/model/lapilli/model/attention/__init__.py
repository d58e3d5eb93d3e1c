"""Attention of lapilli's own for transformers' decoders."""
