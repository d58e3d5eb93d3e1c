"""Files of other projects, read and written: transformers' LLaVA, LLaVA's own, PEFT's."""

__all__ = []
