"""Triton kernels; imported when a config asks for one, so that a machine without Triton runs."""

__all__ = []
