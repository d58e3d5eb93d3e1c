"""The name that LLaVA imports; no weight here has such a state."""

from __future__ import annotations


class ZeroParamStatus:
    """Never looked at on one process."""

    NOT_AVAILABLE = "not available"
