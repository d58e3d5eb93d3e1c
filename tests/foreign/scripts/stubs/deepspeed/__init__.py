"""Stands for DeepSpeed where LLaVA imports two names of it while it saves."""

from . import zero as zero
