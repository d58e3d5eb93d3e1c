"""The one error of this package that a user can cause and mend."""

from __future__ import annotations

__all__ = ["ModelError"]


class ModelError(Exception):
    """A model that cannot be put together: names the value, what was expected and what to do."""
