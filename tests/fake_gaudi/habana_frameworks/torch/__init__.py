"""The part for torch."""

from habana_frameworks.torch import core, hpu

__all__ = ["core", "hpu"]
